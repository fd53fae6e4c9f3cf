"""What published models state in their `config.json`, and how many parameters they have: facts to test against.

Spelled as published, that is as transformers 4 writes it. Fields that say nothing about the computation (token ids,
release of transformers, …) are there in one of each family's, as they are in the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One model: its config.json, its number of parameters, its number of heads' channels and its rotary base."""

    parameters: int
    head: int
    rotary_base: int
    config: dict[str, Any]


def _config(architecture: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, **more: Any) -> dict:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **more,
    }


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool) -> dict:
    return _config(
        "Qwen3", layers, hidden, ffn, heads, 8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1000000,
        rope_scaling=None, attention_bias=False, attention_dropout=0.0, tie_word_embeddings=tied, sliding_window=None,
        use_sliding_window=False, max_window_layers=layers, bos_token_id=151643, eos_token_id=151645,
        transformers_version="4.51.0",
    )  # fmt: skip


def _llama3(layers: int, hidden: int, ffn: int, heads: int, **more: Any) -> dict:
    return _config(
        "Llama", layers, hidden, ffn, heads, 8,
        vocab_size=128256, rms_norm_eps=1e-5, rope_theta=500000.0, attention_bias=False, attention_dropout=0.0,
        pretraining_tp=1, bos_token_id=128000, **more,
    )  # fmt: skip


def _llama31(layers: int, hidden: int, ffn: int, heads: int, factor: float, **more: Any) -> dict:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    ids = [128001, 128008, 128009]
    return _llama3(
        layers, hidden, ffn, heads,
        max_position_embeddings=131072, rope_scaling=scaling, mlp_bias=False, eos_token_id=ids, **more,
    )  # fmt: skip


def _mistral(layers: int, hidden: int, **more: Any) -> dict:
    return _config(
        "Mistral", layers, hidden, 14336, 32, 8,
        rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip


_LLAMA2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    **_config("Llama", 32, 4096, 11008, 32, 32),
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
}

PUBLISHED = {
    "Qwen3-0.6B": Published(596_049_920, 128, 1_000_000, _qwen3(28, 1024, 3072, 16, tied=True)),
    "Qwen3-8B": Published(8_190_735_360, 128, 1_000_000, _qwen3(36, 4096, 12288, 32, tied=False)),
    "Qwen3-32B": Published(32_762_123_264, 128, 1_000_000, _qwen3(64, 5120, 25600, 64, tied=False)),
    "Llama-2-7b": Published(6_738_415_616, 128, 10_000, _LLAMA2_7B),
    "Meta-Llama-3-8B": Published(
        8_030_261_248, 128, 500_000,
        _llama3(32, 4096, 14336, 32, max_position_embeddings=8192, rope_scaling=None, tie_word_embeddings=False),
    ),
    "Llama-3.1-8B-Instruct": Published(
        8_030_261_248, 128, 500_000, _llama31(32, 4096, 14336, 32, 8.0, tie_word_embeddings=False)
    ),
    "Llama-3.2-1B-Instruct": Published(
        1_235_814_400, 64, 500_000, _llama31(16, 2048, 8192, 32, 32.0, head_dim=64, tie_word_embeddings=True)
    ),
    "Llama-3.2-3B-Instruct": Published(
        3_212_749_824, 128, 500_000, _llama31(28, 3072, 8192, 24, 32.0, head_dim=128, tie_word_embeddings=True)
    ),
    "Mistral-7B-v0.1": Published(
        7_241_732_096, 128, 10_000,
        _mistral(
            32, 4096, vocab_size=32000, max_position_embeddings=32768, rope_theta=10000.0, sliding_window=4096
        ),
    ),
    "Mistral-7B-v0.3": Published(
        7_248_023_552, 128, 1_000_000,
        _mistral(
            32, 4096, vocab_size=32768, max_position_embeddings=32768, rope_theta=1000000.0, sliding_window=None,
            attention_dropout=0.0,
        ),
    ),
    "Mistral-Nemo-Instruct-2407": Published(
        12_247_782_400, 128, 1_000_000,
        _mistral(
            40, 5120, vocab_size=131072, max_position_embeddings=131072, rope_theta=1000000.0, sliding_window=None,
            attention_dropout=0.0, head_dim=128,
        ),
    ),
}  # fmt: skip
