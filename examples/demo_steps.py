"""Run commands one after the other under one progress bar, each with its output in a log file.

Takes :class:`Step` objects with a guess of their duration; shows a bar over all of them with the time that is left,
prints a line for each that is done, and raises :class:`StepFailed` with the end of the log at the first that fails.
What a step prints as ``step 30/90`` moves the bar; a step that prints nothing of the kind moves it by the clock.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

TAIL_LINES = 25
POLL_SECONDS = 0.25
_COUNTER = re.compile(rb"\bstep (\d+)/(\d+)\b")


@dataclass(frozen=True)
class Step:
    """A command: short name (also of its log file), what it does in words, a guess of its seconds, the file or folder
    that it makes (without which it has failed, whatever its exit status), and the arguments.
    """

    name: str
    title: str
    seconds: float
    makes: Path | None
    command: Sequence[str]


class StepFailed(Exception):
    """A step ended with an error; the message holds the command, the log's path and the log's end."""


def run_steps(
    steps: Sequence[Step], logs: Path, console: Console, *, cwd: Path, environment: Mapping[str, str]
) -> None:
    """Run the steps. Raises StepFailed at the first failure; ends the running step when interrupted."""
    logs.mkdir(parents=True, exist_ok=True)
    total = sum(step.seconds for step in steps)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=total, left="")
        expected_before, started = 0.0, time.monotonic()
        for number, step in enumerate(steps, start=1):
            label = f"{number}/{len(steps)} {step.title}"
            progress.update(bar, description=label)
            seconds = _run(step, logs / f"{step.name}.log", progress, bar, expected_before, started, cwd, environment)
            expected_before += step.seconds
            progress.update(bar, completed=expected_before)
            console.print(f"{label:48} {seconds:5.0f} s")
    console.print(f"{'all steps':48} {time.monotonic() - started:5.0f} s")


def _run(
    step: Step,
    log: Path,
    progress: Progress,
    bar: TaskID,
    expected_before: float,
    started: float,
    cwd: Path,
    environment: Mapping[str, str],
) -> float:
    """Run one step to its end, moving the bar meanwhile; gives its seconds."""
    begun = time.monotonic()
    total = progress.tasks[bar].total or 1.0
    with log.open("wb") as output:
        # A session of its own, so that ranks started by a launcher can be ended with it.
        child = subprocess.Popen(
            step.command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env=environment, start_new_session=True
        )
        try:
            while child.poll() is None:
                now = time.monotonic()
                done = expected_before + step.seconds * share_done(log, (now - begun) / step.seconds)
                left = (now - started) / max(done, 1.0) * (total - done)
                progress.update(bar, completed=done, left=f"about {left // 60:.0f}:{left % 60:02.0f} left")
                time.sleep(POLL_SECONDS)
        finally:
            if child.poll() is None:
                _end(child)
    if child.returncode != 0:
        raise StepFailed(_failure(step, log, f"failed with status {child.returncode}"))
    if step.makes is not None and not step.makes.exists():
        raise StepFailed(_failure(step, log, f"ended without making {step.makes}"))
    return time.monotonic() - begun


def share_done(log: Path, clock_share: float) -> float:
    """How much of a step is done: by the last ``step i/n`` of its log, or else by the clock. Below 1 until it ends."""
    with log.open("rb") as written:
        written.seek(max(0, log.stat().st_size - 4096))
        counters = _COUNTER.findall(written.read())
    if counters:
        # A tenth of a step's time is taken to be its start.
        done, of = (int(number) for number in counters[-1])
        return min(0.99, 0.1 + 0.9 * done / max(of, 1))
    return min(0.9, clock_share)


def _end(child: subprocess.Popen[bytes]) -> None:
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _failure(step: Step, log: Path, how: str) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    tail = "\n".join(f"  | {line}" for line in lines) or "  | (no output)"
    command = shlex.join(step.command)
    return f"error: '{step.title}' {how}; the end of {log}:\n{tail}\nIts command: {command}"
