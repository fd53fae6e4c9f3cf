"""A tiny random model as a Hugging Face folder and random prepared groups for it, made from seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_amopo.data.groups import GENERAL, TokenizedGroup, TokenizerFingerprint
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.shards import write_groups

#: Not a multiple of 128 × TP, so that Megatron pads the vocabulary.
VOCAB_SIZE = 151


def tiny_config(family: str = "qwen2", *, tied: bool = True, **changes: Any) -> Any:
    """transformers' config of a model that TP 2 and PP 4 divide; ``family`` is transformers' model type."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        **changes,
    }
    if family != "qwen2":  # whose heads are always hidden_size / num_attention_heads
        sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    return AutoConfig.for_model(family, **sizes)


def make_hf_model(
    folder: Path,
    *,
    family: str = "qwen2",
    tied: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """Write a random model to ``folder`` and return it, float32, in evaluation mode; ``dtype`` has all its values."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, tied=tied, **changes)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Initial biases of zero and norms of one would hide a converter or a kernel that forgets them.
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(4.0)
            parameter.copy_(parameter.to(dtype))
    model.save_pretrained(folder)
    return model


def random_groups(
    count: int,
    *,
    dimensions: int = 3,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    longest: int = 24,
    shortest: int = 1,
    shared_question: bool = False,
) -> list[TokenizedGroup]:
    """Groups of random tokens with random lengths, one-token prompts and responses among them. With
    ``shared_question`` the prompts of a record begin with the same tokens, as question-first prompts do.
    """
    rng = np.random.default_rng(seed)

    def tokens() -> np.ndarray:
        return rng.integers(0, vocab_size, rng.integers(shortest, longest + 1)).astype(np.int32)

    groups = []
    for record in range(count):
        chosen, rejected = tokens(), tokens()
        question = tokens() if shared_question else np.zeros(0, np.int32)
        groups.append(
            TokenizedGroup(
                record_id=record,
                prompts=tuple(np.concatenate([question, tokens()]) for _ in range(dimensions)),
                # The same responses under each prompt, cut by one token in some dimensions, as truncation does.
                chosen=tuple(chosen[: max(1, len(chosen) - d % 2)] for d in range(dimensions)),
                rejected=tuple(rejected for _ in range(dimensions)),
            )
        )
    return groups


def draw_scores(rng: np.random.Generator, count: int, dimensions: int) -> np.ndarray:
    """Scores from 1 to 5, [count, dimensions − 1, 2]: chosen, rejected."""
    return rng.integers(1, 6, (count, dimensions - 1, 2))


def make_data(
    folder: Path,
    *,
    train: int = 24,
    validation: int = 10,
    dimensions: int = 3,
    seed: int = 0,
    random_scores: bool = False,
    rewards: Sequence[str] = (),
    **options: Any,
) -> Manifest:
    """Write a prepared folder of random groups; all scores are equal, or random ones from 1 to 5. Rewards of
    these names are random numbers around 0.
    """
    groups = random_groups(train + validation, dimensions=dimensions, seed=seed, **options)
    fingerprint = TokenizerFingerprint("0" * 64, "0" * 64, options.get("vocab_size", VOCAB_SIZE), 2, 0, "tiny")
    manifest = Manifest(
        dimensions=(GENERAL, *(f"quality_{d}" for d in range(1, dimensions))),
        tokenizer=fingerprint,
        prompts={},
        scale=(1.0, 5.0),
        cutoff_len=None,
        records={},
        length_percentiles={},
        data_sha256="",
        created_with={},
        rewards=tuple(rewards),
    )
    splits: dict[str, Sequence[TokenizedGroup]] = {"train": groups[:train]}
    if validation:
        splits["validation"] = groups[train:]
    rng = np.random.default_rng(seed)
    scores: float | dict[str, np.ndarray] = 3.0
    if random_scores:
        scores = {split: draw_scores(rng, len(own), dimensions) for split, own in splits.items()}
    drawn = {split: rng.normal(size=(len(own), len(rewards), 2)) for split, own in splits.items()}
    return write_groups(folder, splits, manifest, scores, rewards=drawn)
