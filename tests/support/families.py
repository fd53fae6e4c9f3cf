"""A tiny model of every family, each with what sets its family apart, as options of ``make_hf_model``."""

from typing import Any

#: The longest sequence that ``random_groups`` makes by default: a prompt and a response of 24 tokens each.
LONGEST = 48

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    # Heads of more channels than hidden_size / num_attention_heads = 16.
    "qwen3": {"family": "qwen3", "tied": False, "head_dim": 24},
    # A context so short that some frequencies are kept, some blended, some divided.
    "llama3": {
        "family": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    },
    # A key and a value for each query.
    "llama2": {"family": "llama", "tied": False, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    # A window into which the longest sequences just fit.
    "mistral": {"family": "mistral", "tied": False, "sliding_window": LONGEST, "rope_theta": 1_000_000.0},
}
