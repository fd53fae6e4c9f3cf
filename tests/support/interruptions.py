"""Conversions that are killed at random moments, and what every loader makes of what they leave.

Run as a program by tests/checkpoint/test_interruption.py: `python -m tests.support.interruptions WORK`. Imports take
longer than a conversion, so this process does them once and forks each attempt. Prints one JSON line: how many attempts
were killed, in which state they left the folders, and every violation found.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from megatron_amopo.checkpoint import checks, convert, megatron_writer
from megatron_amopo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_amopo.checkpoint.hf import HfFolder
from megatron_amopo.checkpoint.megatron import MegatronCheckpoint
from megatron_amopo.errors import CheckpointError
from tests.support.checkpoints import all_files, save_tiny_model

KILLS = 20  # of each direction
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5, "vocab_size": 20_001}
Files = dict[str, bytes]
Convert = Callable[[Path, bool], object]


def main(work: Path) -> None:
    for module in (convert, checks):
        module.PART_NUMBERS = 2**18  # type: ignore[attr-defined]
    megatron_writer._FILE_BYTES = 20 * 2**20
    original, megatron, older = work / "original", work / "megatron", work / "older"
    save_tiny_model(original, dtype=torch.bfloat16, max_shard_size="20MB", **SIZES)
    save_tiny_model(older, dtype=torch.float32)
    run_to_its_end(lambda: hf_to_megatron(original, megatron))
    run_to_its_end(lambda: hf_to_megatron(older, work / "older-megatron"))
    rng = random.Random(20250607)
    result = {
        "import": interrupt(
            work / "import",
            lambda target, force: hf_to_megatron(original, target, force=force),
            (megatron, work / "older-megatron"),
            partly_accepted_megatron,
            rng,
        ),
        "export": interrupt(
            work / "export",
            lambda target, force: megatron_to_hf(megatron, target, force=force),
            (original, older),
            partly_accepted_hf,
            rng,
        ),
    }
    print(json.dumps(result))


def interrupt(
    place: Path,
    conversion: Convert,
    folders: tuple[Path, Path],
    partly_accepted: Callable[[Path, Files], list[str]],
    rng: random.Random,
) -> dict[str, object]:
    """Kill `conversion` of `place`/out KILLS times, by turns where nothing is and over an older folder.

    Args:
        folders: what a complete conversion gives, and the older folder.
        partly_accepted: what a loader takes of a folder although it isn't that of a complete conversion.
    """
    place.mkdir()
    target, (complete, older) = place / "out", folders
    whole = {"new": all_files(complete), "old": all_files(older)}
    start = time.monotonic()
    run_to_its_end(lambda: conversion(target, False))
    duration = time.monotonic() - start
    violations = [] if all_files(target) == whole["new"] else ["an undisturbed conversion differs"]
    states: Counter[str] = Counter()
    killed = number = 0
    while killed < KILLS and number < 5 * KILLS:  # some end before they are killed
        number += 1
        shutil.rmtree(target, ignore_errors=True)
        force = number % 2 == 1
        if force:
            shutil.copytree(older, target)
        killed += ends(lambda force=force: conversion(target, force), rng.uniform(0, duration)) != 0
        found = {folder.name: state(folder, whole) for folder in place.iterdir() if folder.is_dir()}
        states[", ".join(f"{name} {found[name]}" for name in sorted(found)) or "nothing"] += 1
        if found.get("out", "new") == "partial" or (force and not {"old", "new"} & set(found.values())):
            violations.append(f"attempt {number}: {found}")
        for name in (name for name, kind in found.items() if kind == "partial"):
            violations += [f"attempt {number}: {what}" for what in partly_accepted(place / name, whole["new"])]
    run_to_its_end(lambda: conversion(target, target.exists()))
    if all_files(target) != whole["new"] or [path.name for path in place.iterdir()] != ["out"]:
        violations.append("the run after the killed ones differs, or left something")
    return {"killed": killed, "states": states, "violations": violations, "seconds": duration}


def ends(action: Callable[[], object], killed_after: float | None = None) -> int:
    """The exit code of a process of its own that does `action`; killed after so many seconds, if it still runs.

    torch's threads don't survive a fork, so this process itself never computes.
    """
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code


def run_to_its_end(action: Callable[[], object]) -> None:
    assert ends(action) == 0


def state(folder: Path, whole: dict[str, Files]) -> str:
    """Which of the complete folders this is: its key, or 'partial'."""
    files = all_files(folder)
    return next((name for name, content in whole.items() if files == content), "partial")


def partly_accepted_hf(folder: Path, complete: Files) -> list[str]:
    found = []
    for load in (HfFolder.open, AutoModelForCausalLM.from_pretrained):
        with contextlib.suppress(OSError, ValueError):
            load(folder)
            found.append(f"{load} accepts {folder.name}")
    for path in folder.rglob("*"):
        if path.is_dir() or path.read_bytes() == complete.get(path.name):
            continue
        if path.suffix == ".safetensors":
            with contextlib.suppress(SafetensorError), safe_open(path, framework="pt"):
                found.append(f"safetensors opens {path.name}")
    return found


def partly_accepted_megatron(folder: Path, complete: Files) -> list[str]:
    found = []
    with contextlib.suppress(CheckpointError):
        MegatronCheckpoint.open(folder)
        found.append(f"our reader accepts {folder.name}")
    try:
        FileSystemReader(folder / "release").read_metadata()
    except OSError:
        return found
    for name, content in complete.items():
        path = folder / name
        if name.endswith(".distcp") and not (path.is_file() and path.read_bytes() == content):
            found.append(f"DCP accepts release, but {name} is incomplete")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
