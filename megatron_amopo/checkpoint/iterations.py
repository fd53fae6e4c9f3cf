"""Which iterations of a checkpoint folder can be loaded, told without loading them.

Takes a folder in which training saved (``iter_0000100``, …, and ``latest_checkpointed_iteration.txt``, which names the
newest); gives what is usable there, and why something isn't. Training publishes an iteration by renaming a complete
folder (``training/saving.py``), so what is found unusable comes from elsewhere: from Megatron by itself, from an
incomplete copy, from a deletion that was cut short.

Reads DCP's metadata, which is a pickle: look only at checkpoints that you trust.
"""

import json
import re
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from megatron_amopo.checkpoint.megatron import FORMAT, RELEASE, TRACKER

#: What saving leaves out of sight where it is killed (``training/saving.py``).
_LEFT = (".iter_*.partial", ".iter_*.deleted", ".iter_*.replaced")
_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where an iteration lies, by Megatron's naming."""
    return folder / f"iter_{iteration:07d}"


def iterations(folder: Path) -> list[int]:
    """The iterations that have a folder, usable or not, newest first."""
    if not folder.is_dir():
        return []
    matches = (_ITERATION.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def why_unusable(path: Path) -> str | None:
    """What an iteration's folder lacks; None for one that is complete: its metadata can be read, and every file that
    they name is there and at least as long as what they say lies in it.
    """
    try:
        json.loads((path / FORMAT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{FORMAT} can't be read ({_reason(error)})" if path.is_dir() else "it does not exist"
    try:
        storage = FileSystemReader(path).read_metadata().storage_data
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        return f".metadata can't be read ({_reason(error)})"
    ends: dict[str, int] = {}
    for place in storage.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            return f"{name}: {_reason(error)}"
        if size < end:
            return f"{name} has {size:,} of {end:,} bytes"
    return None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or repr(error)


def tracked(folder: Path) -> Path | None:
    """The folder that the tracker file names, there or not; None without a tracker that can be read."""
    try:
        named = (folder / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if named == RELEASE:
        return folder / RELEASE
    return iteration_folder(folder, int(named)) if named.isdecimal() else None


def newest_usable(folder: Path, most: int | None = None) -> int | None:
    """The newest iteration that can be loaded, of those up to ``most``."""
    wanted = (number for number in iterations(folder) if most is None or number <= most)
    return next((number for number in wanted if why_unusable(iteration_folder(folder, number)) is None), None)


def current_iteration(folder: Path) -> int | None:
    """The iteration that the tracker file names, there or not; None where it names none."""
    named = tracked(folder)
    return int(named.name.removeprefix("iter_")) if named is not None and named.name != RELEASE else None


def leftovers(folder: Path) -> list[Path]:
    """What killed runs left out of sight, which the next start removes."""
    return sorted(path for pattern in _LEFT for path in folder.glob(pattern))


def holds_checkpoint(folder: Path) -> bool:
    """Whether a run was saved here, or a model converted to here, usable or not. The tracker file alone doesn't decide:
    a machine that stopped at the wrong moment may have lost it. An iteration's empty folder is none: Megatron makes it
    before its content is written elsewhere.
    """
    return (folder / TRACKER).is_file() or any(
        any(iteration_folder(folder, number).iterdir()) for number in iterations(folder)
    )
