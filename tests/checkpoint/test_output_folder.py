"""A folder appears whole or not at all, one run at a time; what killed runs left is removed or put back."""

from __future__ import annotations

import errno
import fcntl
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_amopo.checkpoint.output_folder import new_folder
from megatron_amopo.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
MARK = "config.json"
WEIGHTS = "1.safetensors"


def write(target: Path, text: str = "new", *, force: bool = False) -> None:
    with new_folder(target, force=force, size=0, sources=[], replaces=MARK) as folder:
        (folder / MARK).write_text(text)
        (folder / WEIGHTS).write_text("weights")


# Writes to argv[1], and kills itself in place of its rename number argv[2]; -1: while writing, 3: while it deletes the
# folder that it replaced.
_DYING = f"""
import os, pathlib, signal, sys
from megatron_amopo.checkpoint.output_folder import new_folder

def rename(path, place, original=pathlib.Path.rename):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return original(path, place)

def remove(path, original=pathlib.Path.unlink):
    original(path)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

pathlib.Path.rename, left, pathlib.Path.unlink = rename, int(sys.argv[2]), remove
with new_folder(pathlib.Path(sys.argv[1]), force=True, size=0, sources=[], replaces="{MARK}") as folder:
    (folder / "{MARK}").write_text("new")
    (folder / "{WEIGHTS}").write_text("weights")
    if left == -1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_at(target: Path, rename: int) -> None:
    done = subprocess.run([sys.executable, "-c", _DYING, str(target), str(rename)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_there_until_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down"
    with new_folder(target, force=False, size=0, sources=[], replaces=MARK) as folder:
        (folder / MARK).write_text("new")
        assert not target.exists()
        assert names(target.parent) == [".down.lock", ".down.partial"]
    assert names(target.parent) == ["down"]
    assert (target / MARK).read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "out", "old")

    def fail() -> None:
        with new_folder(tmp_path / "out", force=True, size=0, sources=[], replaces=MARK) as folder:
            (folder / MARK).write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / MARK).read_text() == "old"


@pytest.mark.parametrize("rename", [-1, 0])
def test_a_killed_run_is_cleaned_up_by_the_next(tmp_path: Path, rename: int) -> None:
    killed_at(tmp_path / "out", rename)
    assert names(tmp_path) == [".out.lock", ".out.partial"]
    write(tmp_path / "out", "second")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / MARK).read_text() == "second"


def test_killed_between_the_renames_of_a_replacement(tmp_path: Path) -> None:
    """Both folders are whole under hidden names; the next run puts the old one back, before anything else."""
    write(tmp_path / "out", "old")
    killed_at(tmp_path / "out", 1)
    assert names(tmp_path) == [".out.lock", ".out.partial", ".out.replaced"]
    assert (tmp_path / ".out.partial" / MARK).read_text() == "new"
    assert (tmp_path / ".out.replaced" / MARK).read_text() == "old"
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / MARK).read_text() == "old"
    write(tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / MARK).read_text() == "new"


@pytest.mark.parametrize(("rename", "left"), [(2, ".out.replaced"), (3, ".out.partial")])
def test_killed_while_the_replaced_folder_is_deleted(tmp_path: Path, rename: int, left: str) -> None:
    """What is put back where nothing stands is whole: a folder that is being deleted isn't called replaced."""
    write(tmp_path / "out", "old")
    killed_at(tmp_path / "out", rename)
    assert names(tmp_path) == sorted([".out.lock", left, "out"])
    assert (tmp_path / "out" / MARK).read_text() == "new"
    shutil.rmtree(tmp_path / "out")
    if left == ".out.replaced":
        with pytest.raises(CheckpointError, match="exists already"):
            write(tmp_path / "out")
        assert (tmp_path / "out" / MARK).read_text() == "old"
    else:
        assert names(tmp_path / left) == [WEIGHTS]  # no loader takes it
        write(tmp_path / "out")
        assert (tmp_path / "out" / MARK).read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_second_run_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target, force=False, size=0, sources=[], replaces=MARK) as folder:
        (folder / MARK).write_text("first")
        with pytest.raises(CheckpointError, match=r"out: another run is writing it \(it holds .*/\.out\.lock\)"):
            write(target, "second")
    assert (target / MARK).read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    write(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / MARK).read_text() == "new"
    assert names(tmp_path) == ["disk", "link"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: can't be made"):
        write(tmp_path / "file" / "out")


def write_while_another_does(target: Path, *, force: bool) -> None:
    with new_folder(
        target, force=force, size=0, sources=[], replaces=MARK, may_hold=lambda path: path.name in (MARK, WEIGHTS)
    ) as folder:
        (folder / MARK).write_text("new")
        target.mkdir(exist_ok=True)
        (target / "thesis.tex").write_text("years of work")


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match="out exists already"):
        write_while_another_does(target, force=False)
    assert names(target) == ["thesis.tex"]
    assert names(tmp_path) == ["out"]


def test_what_appears_meanwhile_is_kept_under_force(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "old")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex, which no conversion writes"):
        write_while_another_does(target, force=True)
    assert names(target) == [WEIGHTS, MARK, "thesis.tex"]
    assert (target / MARK).read_text() == "old"


def test_an_old_folder_without_locks_is_not_overlooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says whether the run that moved it is dead."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = tmp_path / ".out.replaced-0123"
    left.mkdir()
    with pytest.raises(CheckpointError, match=r"\.out\.replaced-0123 is what stood at \S+out before"):
        write(tmp_path / "out")
    left.rmdir()
    write(tmp_path / "out")


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename can't replace it."""
    target = tmp_path / "mounted"
    target.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
    with pytest.raises(CheckpointError, match="mounted is a mount point"):
        write(target, force=True)


def test_two_runs_without_locks_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no locks, each run writes a folder of its own."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with new_folder(tmp_path / "out", force=True, size=0, sources=[], replaces=MARK) as slow:
        (slow / MARK).write_text("slow")
        write(tmp_path / "out", "quick")
        assert (tmp_path / "out" / MARK).read_text() == "quick"
        assert slow.exists()
    assert (tmp_path / "out" / MARK).read_text() == "slow"


def test_a_run_whose_folder_another_took_fails(tmp_path: Path) -> None:
    """A lock that doesn't reach another machine: that one clears the folder away and writes its own."""

    def write_while_another_run_clears_up() -> None:
        with new_folder(tmp_path / "out", force=False, size=0, sources=[], replaces=MARK) as folder:
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "half").touch()

    with pytest.raises(CheckpointError, match="another run has replaced"):
        write_while_another_run_clears_up()
    assert not (tmp_path / "out").exists()
