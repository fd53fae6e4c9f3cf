"""A folder that appears under its name only when it is complete.

What a conversion writes grows in `.NAME.partial` beside its place, and is renamed at the end. One run at a time writes
to a name, which a lock on `.NAME.lock` sees to; whoever holds the lock removes what killed runs left. With `force`, the
folder that is replaced becomes `.NAME.replaced` for the moment between two renames: whatever the moment at which a run
is killed, the old folder or the new one is there whole, and the next run puts an old one back that is found so. Where
the file system has no locks, these names end in a number of their own, and what a killed run leaves is left to people.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_amopo.errors import CheckpointError

# What a conversion writes beside the weights: tokenizer, headers, metadata.
_ROOM_BESIDE_WEIGHTS = 64 * 2**20


@contextlib.contextmanager
def new_folder(
    target: Path,
    *,
    force: bool,
    size: int,
    sources: Sequence[Path],
    replaces: str,
    may_hold: Callable[[Path], bool] = lambda _: True,
) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends well, and vanishes otherwise.

    Args:
        target: must not exist, or be an empty folder, unless `force`.
        size: bytes of the weights to be written.
        sources: folders that are read; the target must not be, contain or lie in one.
        replaces: with `force`, an existing target is replaced only where it holds this file, so that a mistyped path is
            safe,
        may_hold: and where this is so of everything in it.

    Raises:
        CheckpointError: the target may not be written, another run is writing it, or the disk is too small or failed.
    """
    for source in sources:
        inner, outer = target.resolve(), source.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise CheckpointError(f"{target}: the output can't be, hold or lie in the input {source}")
    place = target.resolve()  # a link stays, and what it points to is replaced
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{place.parent}: can't be made: {error}") from error
    try:
        with _alone(place) as locked:
            # Without a lock another run may be at work: its folder is another's, and nothing of it is touched.
            suffix = "" if locked else f"-{uuid.uuid4().hex}"
            if not locked:
                _check_leftovers(place)
            partial, replaced = (place.with_name(f".{place.name}.{state}{suffix}") for state in ("partial", "replaced"))
            _clean_up(place, partial, replaced)
            _check_target(target, force, replaces, may_hold)
            _check_room(place.parent, size)
            partial.mkdir()
            ours = os.open(partial, os.O_RDONLY)  # held open, so that its inode isn't given to another
            try:
                yield partial
                # A lock may not reach other machines (Lustre's localflock): then one of two runs has to fail.
                if not os.path.samestat(os.fstat(ours), partial.stat()):
                    raise CheckpointError(f"{target}: another run has replaced {partial}, which this one was writing")
                for folder, _, names in partial.walk():
                    for path in (*(folder / name for name in names), folder):
                        sync(path)
                _check_target(target, force, replaces, may_hold)  # again: much may have happened meanwhile
                if force and place.exists():
                    place.rename(replaced)
                partial.rename(place)  # an empty folder gives way, nothing else does
                sync(place.parent)
            finally:
                os.close(ours)
                with contextlib.suppress(OSError):  # the next run tries again
                    _clean_up(place, partial, replaced)
    except OSError as error:
        raise CheckpointError(f"{target}: can't be written: {error}") from error


def check_folder(path: Path) -> None:
    """CheckpointError where a folder that is to be read isn't there, or isn't one."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: a file, not a folder" if path.exists() else f"{path}: no such folder")
    try:
        os.scandir(path).close()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file and see to it that it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """See to it that a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clean_up(place: Path, partial: Path, replaced: Path) -> None:
    """Remove what an interrupted run left, and put back what it was about to replace."""
    if replaced.exists() and not place.exists():
        replaced.rename(place)
    if partial.exists():
        _delete(partial)
    if replaced.exists():
        replaced.rename(partial)  # what is called replaced is always whole: it may be put back
        _delete(partial)


def _delete(folder: Path) -> None:
    """Remove a folder, smallest files first: without configuration and metadata no loader takes the weights left."""
    for path in sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.lstat().st_size):
        path.unlink()
    shutil.rmtree(folder)


def _check_leftovers(place: Path) -> None:
    """Where locks don't work, whether what lies there is a killed run's can't be known: a person has to say."""
    left = [] if place.exists() else sorted(place.parent.glob(f".{place.name}.replaced-*"))
    if left:
        raise CheckpointError(
            f"{left[0]} is what stood at {place} before a run was killed that replaced it; rename it back, or remove it"
        )


def _check_target(target: Path, force: bool, replaces: str, may_hold: Callable[[Path], bool]) -> None:
    if target.is_mount():
        raise CheckpointError(f"{target} is a mount point, which can't be replaced; name a folder in it")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise CheckpointError(f"{target} exists already; --force replaces it")
    if not (target / replaces).is_file():
        raise CheckpointError(f"{target} has no {replaces}: --force replaces only what a conversion could have written")
    for path in sorted(target.iterdir()):
        if not may_hold(path):
            raise CheckpointError(
                f"{target} holds {path.name}, which no conversion writes: --force replaces only folders "
                "without other files"
            )


def _check_room(folder: Path, size: int) -> None:
    needed, free = size + _ROOM_BESIDE_WEIGHTS, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder}: {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Hold the lock of a place (True). The system lets go of it when the process ends, however that happens.

    Where the file system has no locks, nothing is held (False).
    """
    path = place.with_name(f".{place.name}.lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(f"{place}: another run is writing it (it holds {path})") from None
        except OSError:
            locked = False
            break
        # Whoever held the lock before may have removed the file after we opened it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                locked = True
                break
        os.close(descriptor)
    try:
        yield locked
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
