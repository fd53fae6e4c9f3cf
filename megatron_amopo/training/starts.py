"""When and how a run was started and resumed: ``starts.jsonl`` in its folder.

Takes Megatron's validated arguments; adds a line per start. ``run.json`` holds what must stay the same within a run;
this is the rest, for people: layout, batch, learning rate, software.
"""

import json
import platform
from argparse import Namespace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_amopo import __version__
from megatron_amopo.files import write_whole
from megatron_amopo.training.run_files import STARTS_FILE

_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "pyarrow", "numpy")


def record_start(folder: Path, args: Namespace) -> None:
    """Add a line to ``folder``'s starts; a run that begins at step 0 begins the file anew."""
    line = {
        "step": args.iteration,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": args.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": _versions(),
        "arguments": {name: _plain(value) for name, value in sorted(vars(args).items())},
    }
    path = folder / STARTS_FILE
    before = path.read_text(encoding="utf-8") if args.iteration and path.is_file() else ""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{before}{json.dumps(line)}\n")


def _versions() -> dict[str, str]:
    found = {"megatron-amopo": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an optional one
            continue
    return found


def _plain(value: Any) -> Any:
    """A value as JSON has it; what JSON doesn't have, by its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value)
