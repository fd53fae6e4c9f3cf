"""Which checkpoint a run goes on from where the tracker's can't be loaded, and what is refused."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_amopo.checkpoint.iterations import holds_checkpoint, iteration_folder
from megatron_amopo.checkpoint.megatron import FORMAT, TRACKER
from megatron_amopo.errors import CheckpointError
from megatron_amopo.training.resuming import check_loadable

ARGS = Namespace(rank=0, ckpt_step=None)


@pytest.fixture
def folder(tmp_path):
    """Complete checkpoints of steps 10, 20 and 30; the tracker names 20, which is damaged."""
    for number in (10, 20, 30):
        path = iteration_folder(tmp_path, number)
        dcp.save({"weight": torch.arange(10.0)}, checkpoint_id=path, no_dist=True)
        (path / FORMAT).write_text('{"sharded_backend": "torch_dist"}')
    (iteration_folder(tmp_path, 20) / FORMAT).unlink()
    (tmp_path / TRACKER).write_text("20")
    return tmp_path


def test_a_future_that_was_given_up_is_not_gone_on_with(folder, capsys):
    check_loadable(ARGS, "--load", folder)
    assert (folder / TRACKER).read_text() == "10"
    assert "Going on from step 10" in capsys.readouterr().out
    (folder / TRACKER).write_text("")  # it names nothing, so the newest it is
    check_loadable(ARGS, "--load", folder)
    assert (folder / TRACKER).read_text() == "30"


def test_nothing_earlier_is_refused(folder):
    shutil.rmtree(iteration_folder(folder, 10))
    with pytest.raises(CheckpointError, match=r"--load .* names iter_0000020.*; no earlier checkpoint in it can be"):
        check_loadable(ARGS, "--load", folder)


def test_a_starting_point_is_not_written_to(folder):
    with pytest.raises(
        CheckpointError, match=r"--pretrained-checkpoint .*To start from step 10, write 10 into latest_"
    ):
        check_loadable(ARGS, "--pretrained-checkpoint", folder)
    assert (folder / TRACKER).read_text() == "20"


def test_a_read_only_folder_is_one_line(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(CheckpointError, match=r"--load .*can't be mended \(Read-only file system\)"):
        check_loadable(ARGS, "--load", folder)


def test_checkpoints_of_which_none_can_be_loaded_are_refused_not_passed_over(folder):
    (folder / TRACKER).unlink()
    for number in (10, 30):
        (iteration_folder(folder, number) / ".metadata").unlink()
    assert holds_checkpoint(folder)
    with pytest.raises(CheckpointError, match="is missing or damaged; no other checkpoint in it can be"):
        check_loadable(ARGS, "--load", folder)


def test_an_empty_folder_of_megatrons_is_no_checkpoint(tmp_path):
    iteration_folder(tmp_path, 10).mkdir()
    assert not holds_checkpoint(tmp_path)
