"""Conversions in processes of their own, to be killed at random moments, and what loaders make of what they leave.

Importing torch takes longer than a small conversion, so a fork server (tests/checkpoint/conftest.py) imports it once
and never computes: what it forks has neither threads nor locks of its parent's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import FileSystemReader
from tqdm import tqdm

from megatron_amopo.checkpoint import checks, convert, megatron_writer
from megatron_amopo.checkpoint.convert import megatron_to_hf
from megatron_amopo.checkpoint.hf import HfFolder
from megatron_amopo.checkpoint.megatron import MegatronCheckpoint
from megatron_amopo.errors import CheckpointError
from tests.support.checkpoints import all_files

Files = dict[str, bytes]
Conversion = Callable[..., object]
"""hf_to_megatron or megatron_to_hf: (input, output, force=…)."""

_processes = multiprocessing.get_context("forkserver")


@dataclass
class Interruptions:
    """What a series of killed conversions left."""

    killed: int = 0
    in_the_middle: int = 0
    """Of them, those that left something unfinished."""
    states: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def convert_in_a_process(
    conversion: Conversion, source: Path, target: Path, *, force: bool = False, killed_after: float | None = None
) -> tuple[float, bool]:
    """Seconds that a conversion took in a process of its own, and whether it was killed (SIGKILL) after so many."""
    reading, writing = _processes.Pipe(duplex=False)
    child = _processes.Process(target=_convert, args=(conversion, source, target, force, writing))
    child.start()
    writing.close()  # the child's end alone is open: its death is the end of what can be read
    assert reading.recv() == "begins"
    start = time.monotonic()
    child.join(killed_after)
    child.kill()  # does nothing to a process that has ended
    child.join()
    with contextlib.suppress(EOFError):
        raise AssertionError(reading.recv())
    assert child.exitcode == 0 or (killed_after is not None and child.exitcode == -9), child.exitcode
    return time.monotonic() - start, child.exitcode != 0


def _convert(conversion: Conversion, source: Path, target: Path, force: bool, begins: Connection) -> None:
    for module in (convert, checks):
        module.PART_NUMBERS = 2**18  # type: ignore[attr-defined]
    megatron_writer._FILE_BYTES = 20 * 2**20
    os.sync()  # what the attempt before has left to write shall not slow this one
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
    begins.send("begins")
    try:
        conversion(source, target, force=force)
    except Exception:
        begins.send(traceback.format_exc())
        raise


def interrupt(
    place: Path, conversion: Conversion, source: Path, complete: Path, older: Path, kills: int, rng: random.Random
) -> Interruptions:
    """Kill `conversion` of `source` to `place`/out so many times, by turns where nothing is and over an older folder.

    Args:
        complete: what a complete conversion gives.
        older: the older folder.
    """
    place.mkdir()
    target = place / "out"
    whole = {"new": all_files(complete), "old": all_files(older)}
    duration, _ = convert_in_a_process(conversion, source, target)
    found = Interruptions()
    if all_files(target) != whole["new"]:
        found.violations.append("an undisturbed conversion differs")
    accepted = accepted_as_hf if conversion is megatron_to_hf else accepted_as_megatron
    for number in range(5 * kills):  # some end before they are killed
        if found.killed == kills:
            break
        shutil.rmtree(target, ignore_errors=True)
        force = number % 2 == 1
        if force:
            shutil.copytree(older, target)
        # Killed after the first of its renames, the attempt before has left the older folder to be put back.
        force |= (place / ".out.replaced").exists()
        moment = rng.uniform(0, duration)
        took, killed = convert_in_a_process(conversion, source, target, force=force, killed_after=moment)
        # The first one may have been slow; later moments are of what it takes.
        duration = duration if killed else min(duration, took)
        left = {folder.name: state(folder, whole) for folder in place.iterdir() if folder.is_dir()}
        partial = [name for name, kind in left.items() if kind == "partial"]
        found.killed += killed
        found.in_the_middle += killed and partial == [".out.partial"]
        found.states[", ".join(f"{name} {left[name]}" for name in sorted(left)) or "nothing"] += 1
        if "out" in partial or (force and not {"old", "new"} & set(left.values())):
            found.violations.append(f"attempt {number}: {left}")
        for name in partial:
            found.violations += [f"attempt {number}: {what}" for what in accepted(place / name, whole["new"])]
    convert_in_a_process(conversion, source, target, force=True)
    if all_files(target) != whole["new"] or [path.name for path in place.iterdir()] != ["out"]:
        found.violations.append("the run after the killed ones differs, or left something")
    return found


def state(folder: Path, whole: dict[str, Files]) -> str:
    """Which of the complete folders this is: its key, or 'partial'."""
    files = all_files(folder)
    return next((name for name, content in whole.items() if files == content), "partial")


def accepted_as_hf(folder: Path, complete: Files) -> list[str]:
    """Which loaders take an incomplete Hugging Face folder, or a file in it."""
    from transformers import AutoModelForCausalLM

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


def accepted_as_megatron(folder: Path, complete: Files) -> list[str]:
    """Which loaders take an incomplete Megatron checkpoint."""
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
