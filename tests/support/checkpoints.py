"""Tiny random Qwen2 folders for the converter, and plain ways to read and to spoil a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

VOCABULARY = 151  # not divisible by 128 x TP
LAYERS = 4
MakeFolder = Callable[..., Path]


def save_tiny_model(
    folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB"
) -> Path:
    """Save a Qwen2 model of random weights (biases and norms, too) and a stand-in for a tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def all_files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library alone."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def edit_config(folder: Path, **fields: object) -> None:
    """Set fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(fields)
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
