"""What of a folder of checkpoints can be loaded: complete or not at all."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_amopo.checkpoint.iterations import (
    holds_checkpoint,
    iteration_folder,
    iterations,
    newest_usable,
    tracked,
    why_unusable,
)
from megatron_amopo.checkpoint.megatron import FORMAT, TRACKER


@pytest.fixture
def folder(tmp_path):
    """Iterations 10 and 20, complete."""
    for number in (10, 20):
        path = iteration_folder(tmp_path, number)
        dcp.save({"weight": torch.arange(1000.0) + number}, checkpoint_id=path, no_dist=True)
        (path / FORMAT).write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / TRACKER).write_text("20")
    return tmp_path


def data_file(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def cut_data(path):
    data = data_file(path)
    data.write_bytes(data.read_bytes()[:-1])


def damage_metadata(path):
    metadata = path / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / FORMAT).unlink(), "metadata.json can't be read (No such file or directory)"),
        (lambda path: (path / FORMAT).write_text(""), "metadata.json can't be read"),
        (damage_metadata, ".metadata can't be read"),
        (lambda path: data_file(path).unlink(), "No such file or directory"),
        (cut_data, " bytes"),
        (shutil.rmtree, "it does not exist"),
    ],
)
def test_what_is_not_complete_is_not_usable(folder, damage, reason):
    assert iterations(folder) == [20, 10]
    assert why_unusable(iteration_folder(folder, 20)) is None
    assert newest_usable(folder) == 20
    damage(iteration_folder(folder, 20))
    assert reason in why_unusable(iteration_folder(folder, 20))
    assert newest_usable(folder) == 10
    assert holds_checkpoint(folder)


def test_the_tracker(folder, tmp_path):
    assert tracked(folder) == folder / "iter_0000020"
    for text, expected in (("release", "release"), ("7", "iter_0000007"), ("", None), ("7 or so", None)):
        (folder / TRACKER).write_text(text)
        assert tracked(folder) == (expected and folder / expected)
    (folder / TRACKER).unlink()
    assert tracked(folder) is None
    assert holds_checkpoint(folder)
    assert not holds_checkpoint(tmp_path / "nothing")
