"""Tiny random folders for the converter, and plain ways to read and to spoil a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_amopo.certification.tiny import tiny_config
from megatron_amopo.checkpoint import checks, convert, verify

VOCABULARY = 151  # not divisible by 128 x TP
LAYERS = 4
MakeFolder = Callable[..., Path]


def save_tiny_model(
    folder: Path,
    *,
    family: str = "qwen2",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
    **changes: Any,
) -> Path:
    """Save a model of random weights (biases and norms, too) and a stand-in for a tokenizer."""
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": VOCABULARY, "num_attention_heads": 8, "max_position_embeddings": 128, **changes}
    model = AutoModelForCausalLM.from_config(tiny_config(family, tied=tied, **sizes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def use_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of at most 700 numbers, which cut every matrix of a tiny model several times."""
    for module in (convert, verify, checks):
        monkeypatch.setattr(module, "PART_NUMBERS", 700)


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
