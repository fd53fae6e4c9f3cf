"""What all benchmarks share: interleaved timing, peak memory, facts about the machine, results written to a folder.

A benchmark compares candidates within one run, because machines are noisy and no two alike: every repetition times each
candidate once, one after the other, so that whatever slows the machine down slows all of them. Ratios are taken within
a repetition. Takes functions without arguments; gives medians with their spread, and a folder with ``README.md``,
``results.json`` and PNG files.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import psutil
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from megatron_amopo import device
from megatron_amopo.planning.hardware import gpu_of_device

RESULTS = Path(__file__).resolve().parent / "results"
COLOURS = ("#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by colour-blind eyes, too
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
GIB = 2**30
MIB = 2**20

_SAMPLE_EVERY_S = 0.002
# Of malloc.h: arrays from the first on get pages of their own; more free memory than the second is given back.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_PACKAGES = ("torch", "megatron-core", "transformers")


@dataclass(frozen=True)
class Samples:
    """One figure, measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def per(self, other: "Samples") -> "Samples":
        """The ratio of the two, repetition by repetition."""
        return Samples(tuple(mine / theirs for mine, theirs in zip(self.values, other.values, strict=True)))

    def text(self, format_spec: str = ".3g") -> str:
        """``median (smallest – largest)``."""
        middle, low, high = (format(x, format_spec) for x in (self.median, min(self.values), max(self.values)))
        return f"{middle} ({low} – {high})"


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]], repetitions: int, *, warmups: int = 1
) -> dict[str, Samples]:
    """Seconds of each candidate: ``warmups`` rounds that don't count, then ``repetitions`` rounds, each candidate once
    a round. The order turns around from round to round, so that none always follows the same neighbour.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with tqdm(total=(warmups + repetitions) * len(candidates), unit="run", mininterval=10) as bar:
        for number in range(-warmups, repetitions):
            bar.set_description(f"round {number + 1} of {repetitions}" if number >= 0 else "warming up")
            names = list(candidates)
            for name in names[:: -1 if number % 2 else 1]:
                gc.collect()
                _synchronize()
                start = time.perf_counter()
                candidates[name]()
                _synchronize()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def peak_extra_memory(function: Callable[[], Any]) -> int:
    """Bytes at the highest point of a call beyond those at its beginning: of CUDA's allocator, else of the process'
    resident memory, sampled every 2 ms. Let the function run once before, for what it keeps for good.
    """
    gc.collect()
    if device.has_cuda():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    with _freed_memory_returned():
        return _peak_extra_resident_memory(function)


def _peak_extra_resident_memory(function: Callable[[], Any]) -> int:
    process, finished = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not finished.wait(_SAMPLE_EVERY_S):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        function()
    finally:
        finished.set()
        sampler.join()
    return max(peak, process.memory_info().rss) - before


def device_peak_tflops(given: float | None, dtype: torch.dtype) -> float | None:
    """The device's dense peak in a dtype, 10¹² operations/s: what was given, else of its data sheet where that is known
    (bfloat16).
    """
    if given is not None or not device.has_cuda() or dtype != torch.bfloat16:
        return given
    row = gpu_of_device(torch.cuda.get_device_name())
    return None if row is None else row.bf16_flops / 1e12


def command_of(module: str, arguments: Sequence[str] | None) -> str:
    """The command by which a benchmark was started; ``arguments`` are those of its ``main``, None the process'."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def machine_facts() -> dict[str, Any]:
    """What a reader needs to know about the machine and the software, without its name."""
    facts: dict[str, Any] = {
        "machine": f"{os.cpu_count()}-core CPU, {round(psutil.virtual_memory().total / GIB)} GiB",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    if device.has_cuda():
        properties = torch.cuda.get_device_properties(0)
        facts["machine"] = f"{properties.name}, {round(properties.total_memory / GIB)} GiB"
        facts["cuda"] = torch.version.cuda
    return facts


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def write_results(
    folder: Path, *, title: str, command: str, text: str, data: Mapping[str, Any], figures: Mapping[str, Figure]
) -> None:
    """Write ``README.md``, ``results.json`` and ``NAME.png`` into ``folder``. Results that it holds are replaced;
    other people's files in it stay.

    Args:
        folder: usually ``RESULTS / name``.
        title: heading of the page.
        command: by which it was made.
        text: Markdown of the page: tables and what they say. Figures follow it.
        data: everything measured, for machines; the machine's facts are added.
        figures: by file name without suffix.
    """
    facts = machine_facts()
    folder.mkdir(parents=True, exist_ok=True)
    software = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "machine")
    images = "".join(f"\n![{name}]({name}.png)\n" for name in figures)
    page = f"# {title}\n\nOn {facts['machine']} ({software}), by\n\n    {command}\n\n{text.strip()}\n{images}"
    results = json.dumps({"command": command, **facts, **data}, indent=2, ensure_ascii=False) + "\n"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".results-") as beside:
        partial = Path(beside)
        for name, figure in figures.items():
            figure.savefig(partial / f"{name}.png", dpi=150, bbox_inches="tight")
        (partial / "results.json").write_text(results, encoding="utf-8")
        (partial / "README.md").write_text(page, encoding="utf-8")
        for path in partial.iterdir():
            os.replace(path, folder / path.name)


def _synchronize() -> None:
    if device.has_cuda():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """Let the C library (glibc) give freed memory back at once, so that what is resident is what is in use. Otherwise
    it keeps arrays of up to 32 MiB for later, in pieces that depend on all that was allocated before.
    """
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    library.malloc_trim(0)
    library.mallopt(_M_MMAP_THRESHOLD, MIB)
    try:
        yield
    finally:
        # To which the library raises them by itself in a process like this one, until somebody has set one of them.
        library.mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        library.mallopt(_M_TRIM_THRESHOLD, 64 * MIB)
