"""The folders that the converter's tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_amopo.checkpoint import checks, convert, verify
from tests.support.checkpoints import MakeFolder, save_tiny_model


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """make_folder(name, family=…, tied=…, dtype=…, max_shard_size=…) saves a random model with transformers; gives its
    folder."""
    return lambda name="original", **options: save_tiny_model(tmp_path / name, **options)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of at most 700 numbers, which cut every matrix of a tiny model several times."""
    for module in (convert, verify, checks):
        monkeypatch.setattr(module, "PART_NUMBERS", 700)
