"""The folders that the converter's tests start from."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from megatron_amopo.certification.ranks import CPU_RANK
from tests.support.checkpoints import MakeFolder, save_tiny_model, use_small_parts

# Importing Megatron takes most of a rank's time, and torch most of a small conversion's: what tests start are forks of
# one process that has imported both and never computes.
multiprocessing.set_forkserver_preload([CPU_RANK])


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """make_folder(name, family=…, tied=…, dtype=…, max_shard_size=…) saves a random model with transformers; gives its
    folder."""
    return lambda name="original", **options: save_tiny_model(tmp_path / name, **options)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_parts(monkeypatch)
