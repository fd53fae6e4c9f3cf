"""What saving removes and when, and what a failing file system becomes: one line, and no half checkpoints."""

import shutil
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.training import training
from torch.distributed import checkpoint as dcp

from megatron_amopo.checkpoint.iterations import iteration_folder, iterations, leftovers, tracked
from megatron_amopo.checkpoint.megatron import FORMAT, TRACKER
from megatron_amopo.training import checks
from megatron_amopo.training.hooks import Hooks
from megatron_amopo.training.saving import SaveFailed, Saving
from megatron_amopo.training.stopping import Stopping
from megatron_amopo.training.survival_arguments import Retention

USAGE = namedtuple("usage", "total used free")


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path):
    """Complete checkpoints of steps 10, 20 and 30; 5 is a link to one elsewhere."""
    save = tmp_path / "save"
    for number in (10, 20, 30):
        write(iteration_folder(save, number))
    write(tmp_path / "elsewhere")
    iteration_folder(save, 5).symlink_to(tmp_path / "elsewhere")
    (save / TRACKER).write_text("30")
    return save


def write(path: Path) -> None:
    dcp.save({"weight": torch.arange(10_000.0)}, checkpoint_id=path, no_dist=True)
    (path / FORMAT).write_text('{"sharded_backend": "torch_dist"}')


def test_a_start_thins_out_what_a_killed_run_could_not(folder):
    (folder / ".iter_0000040.partial").mkdir()
    saving = Saving(str(folder), Retention(2))
    with saving:
        saving.begin(30)
    assert iterations(folder) == [30, 20, 5]
    assert not leftovers(folder)
    assert iteration_folder(folder, 5).is_symlink()


def test_a_start_from_an_older_step_deletes_no_checkpoint(folder):
    saving = Saving(str(folder), Retention(1))
    with saving:
        saving.begin(10)
    assert iterations(folder) == [30, 20, 10, 5]


def test_room_counts_what_the_start_removes(folder, monkeypatch):
    shutil.copytree(iteration_folder(folder, 10), folder / ".iter_0000040.partial")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, 0))
    each = 40_000
    args = Namespace(
        save=str(folder),
        load=str(folder),
        ckpt_step=None,
        skip_train=False,
        amopo_keep_checkpoints=2,
        save_retain_interval=None,
    )

    def has_room(bytes_needed, **changes):
        monkeypatch.setattr(checks, "checkpoint_bytes", lambda *_: bytes_needed)
        try:
            checks.check_room(Namespace(**vars(args) | changes), {})
        except checks.ConfigError:
            return False
        return True

    assert has_room(2 * each)  # the leftover and step 10
    assert not has_room(3 * each)
    assert has_room(each, amopo_keep_checkpoints=None)
    assert not has_room(2 * each, amopo_keep_checkpoints=None)
    assert not has_room(2 * each, load=None)


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def hooks_of(folder, original, monkeypatch):
    """Hooks with as much of a run as saving needs."""
    saving = Saving(str(folder), Retention())
    hooks = Hooks.__new__(Hooks)
    nothing = Namespace(save_into=lambda _: None)
    hooks.observers = Namespace(before_checkpoint=lambda: None, bad_steps=nothing)
    hooks.multipliers, hooks.saving, hooks.described = nothing, saving, True
    hooks.original = {"save_checkpoint": original}
    args = Namespace(save=str(folder), async_save=False)
    monkeypatch.setattr("megatron_amopo.training.hooks.get_args", lambda: args)
    monkeypatch.setattr(training, "maybe_finalize_async_save", lambda **_: None)
    return hooks


@pytest.mark.parametrize("where", ["Megatron's folder", "Megatron's tracker file", "our folder"])
def test_a_full_disk_anywhere_in_saving_is_one_line(folder, monkeypatch, where):
    hooks = hooks_of(folder, fail, monkeypatch)
    if where == "Megatron's folder":
        monkeypatch.setattr(Path, "mkdir", fail)
        monkeypatch.setitem(hooks.original, "save_checkpoint", lambda _: pytest.fail("Megatron must not begin"))
    if where == "our folder":
        hooks.described, hooks.config, hooks.reference = False, None, Namespace(identity=None)
        monkeypatch.setattr("megatron_amopo.training.hooks.describe_run_folder", fail)
    with pytest.raises(SaveFailed, match=r"--save .*No space left.*; the newest checkpoint is iter_0000030"):
        hooks._save_checkpoint(40)


def test_a_failed_save_leaves_nothing_half_written(folder, monkeypatch):
    def half(_state, place, *_, **__):
        (Path(place) / "data").write_bytes(b"half")
        fail()

    saving = Saving(str(folder), Retention())
    with saving:
        saving._write = half
        with pytest.raises(SaveFailed, match="the newest checkpoint is iter_0000030"):
            saving._save({}, str(iteration_folder(folder, 40)))
    assert not leftovers(folder)


def test_the_tracker_names_what_is_published(folder):
    saving = Saving(str(folder), Retention())
    with saving:
        saving._write = lambda _state, place, *_, **__: write(Path(place))
        saving._save({}, str(iteration_folder(folder, 40)))
    assert tracked(folder) == iteration_folder(folder, 40)


def test_what_can_not_be_deleted_stays(folder, monkeypatch, capsys):
    monkeypatch.setattr(Path, "rename", fail)
    saving = Saving(str(folder), Retention(1))
    with saving:
        saving.begin(30)
    assert iterations(folder) == [30, 20, 10, 5]
    assert "is superfluous, and can't be deleted: [Errno 28]" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "code"), [(None, 1), (3, None)])
def test_megatrons_exit_without_a_code_is_a_stop_only_after_a_step(step, code, capsys):
    stopping = Stopping(Namespace(save=None, skip_train=False, exit_signal_handler=False, rank=0))
    stopping.step = step
    found = None
    try:
        with stopping:
            raise SystemExit
    except SystemExit as error:
        found = error.code
    assert found == code
    assert ("Megatron ended the run" in capsys.readouterr().err) == (code == 1)
    with pytest.raises(SystemExit) as other, stopping:
        raise SystemExit(16)
    assert other.value.code == 16
