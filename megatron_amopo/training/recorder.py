"""Where the measured numbers go: the console, ``metrics.jsonl`` in the run's folder, and Megatron's TensorBoard and W&B
writers.

Takes reduced metrics, after every step and every evaluation, on the rank that prints (the last); gives text and files.
A figure that isn't finite is null in the file, as JSON has no other word for it.
Megatron's own line hides negative values, which log-probabilities and margins are, so ours stands beside it.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_amopo.errors import AmopoError
from megatron_amopo.files import write_whole
from megatron_amopo.training.leakage import LeakageMatrix

if TYPE_CHECKING:  # it comes with Megatron, which nothing here needs
    from megatron_amopo.training.bad_steps import BadStep


class ScalarWriter(Protocol):
    """What is used of TensorBoard's ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


class ScalarLog(Protocol):
    """What is used of a W&B run."""

    def log(self, data: dict[str, Any], step: int) -> None: ...


class MetricsFailed(AmopoError):
    """Metrics can't be written; raised on the rank that writes them alone."""


@dataclass
class Recorder:
    """Records training and validation metrics. One per run, on the last rank only."""

    dimensions: tuple[str, ...]
    records_per_step: int
    total_steps: int
    log_interval: int
    file: Path | None  # of JSON lines; None writes none
    tensorboard: ScalarWriter | None = None
    wandb: ScalarLog | None = None
    _pending: list[tuple[list[str], Tensor]] = field(default_factory=list)
    _interval_start: float = field(default_factory=time.monotonic)
    _paused: float = 0.0
    _validated: set[int] = field(default_factory=set)
    _console: Console = field(default_factory=lambda: Console(width=120, highlight=False, markup=False, emoji=False))

    def resume(self, iteration: int) -> None:
        """Continue a file at ``iteration``: what a run that was stopped wrote of later ones is dropped. 0 starts
        anew.
        """
        if self.file is None or not self.file.exists():
            return
        with _failures(self.file):
            lines = [_parse(line) for line in self.file.read_text().splitlines()]
            kept = [line for line in lines if line is not None and 0 < iteration >= line["iteration"]]
            self._validated = {line["iteration"] for line in kept if line["split"] == "validation"}
            write_whole(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def mend(self) -> None:
        """Cut a file back to its last whole line: a run that was killed may have left a part of one behind it."""
        if self.file is None or not self.file.exists():
            return
        with _failures(self.file):
            text = self.file.read_text()
            if not text.endswith("\n"):
                write_whole(self.file, text[: text.rfind("\n") + 1])

    def start_clock(self) -> None:
        """Training begins now."""
        self._interval_start, self._paused = time.monotonic(), 0.0

    def step(
        self, iteration: int, metrics: Mapping[str, Tensor], *, learning_rate: float | None, grad_norm: float | None
    ) -> None:
        """Take one training step's metrics (0-dim tensors on the device); every ``log_interval`` steps their means go
        out. A step without any, which was left out, doesn't count.
        """
        if names := list(metrics):
            self._pending.append((names, torch.stack([metrics[name].reshape(()).float() for name in names])))
        if (iteration % self.log_interval and iteration != self.total_steps) or not self._pending:
            return
        names = self._pending[-1][0]
        means = torch.stack([values for _, values in self._pending]).mean(0).tolist()
        values: dict[str, float] = dict(zip(names, means, strict=True))
        now = time.monotonic()
        seconds = now - self._interval_start - self._paused
        records_per_s = len(self._pending) * self.records_per_step / seconds
        values["records_per_s"] = records_per_s
        values["tokens_per_s"] = records_per_s * values["tokens_per_record"]
        if learning_rate is not None:
            values["learning_rate"] = float(learning_rate)
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        remaining = (self.total_steps - iteration) * seconds / len(self._pending)
        self._pending, self._interval_start, self._paused = [], now, 0.0

        self._write("train", iteration, values)
        margins = " ".join(f"{name} {values[f'margin/{name}']:+.3f}" for name in self.dimensions)
        self._console.print(
            f"step {iteration}/{self.total_steps} | loss {values['loss']:.4f} nats | {records_per_s:.1f} records/s, "
            f"{values['tokens_per_s']:,.0f} tokens/s | {_clock(remaining)} left | margins (nats/token): {margins}",
            soft_wrap=True,
        )

    def bad_step(self, iteration: int, bad: "BadStep") -> None:
        """Take a step that didn't change the weights, with the records behind it."""
        figures = {"loss": bad.loss, "grad_norm": bad.grad_norm}
        records = {"reason": bad.reason, "not_finite": bad.suspects, "records": list(bad.records)}
        self._write("bad_step", iteration, figures, **records)
        self._console.print(f"> {bad.message(iteration)}; the weights stay as they were", soft_wrap=True)

    def conflict(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Take the conflict meter's figures of one step, a split of their own: few steps have them."""
        self._write("conflict", iteration, figures)
        kind = "batch_cosine/"
        cosines = " ".join(
            f"{name.removeprefix(kind)} {value:+.3f}" for name, value in figures.items() if name.startswith(kind)
        )
        self._console.print(f"step {iteration}/{self.total_steps} | gradient cosines: {cosines}", soft_wrap=True)

    def fp8(self, iteration: int, figures: Mapping[str, float], seconds: float) -> None:
        """Take the FP8 check's figures before one step, a split of their own; its time doesn't count as training."""
        self._paused += seconds
        self._write("fp8", iteration, figures)
        flips = " ".join(f"{name} {100 * figures[f'flipped/{name}']:.1f}" for name in self.dimensions)
        self._console.print(
            f"step {iteration}/{self.total_steps} | FP8 moves log p by {figures['logp_difference']:.4f} nats/token on "
            f"average, {figures['logp_difference_max']:.3f} at most; flipped margins (%): {flips}",
            soft_wrap=True,
        )

    def validation(
        self, iteration: int, metrics: Mapping[str, Tensor], seconds: float, leakage: LeakageMatrix | None = None
    ) -> None:
        """Take an evaluation's metrics, means over the whole validation set; its time doesn't count as training."""
        self._paused += seconds
        values = {name: float(value) for name, value in metrics.items()}
        self._write("validation", iteration, values | (leakage.metrics() if leakage else {}))
        table = Table(
            title=f"validation after step {iteration}: loss {values['loss']:.4f} nats ({seconds:.1f} s)",
            title_justify="left",
        )
        table.add_column("dimension")
        for heading in ("margin, nats/token", "accuracy, %", "weight", "mean p", "σ of p", "pair loss, nats"):
            table.add_column(heading, justify="right")
        for name in self.dimensions:
            table.add_row(
                name,
                f"{values[f'margin/{name}']:+.4f}",
                f"{100 * values[f'accuracy/{name}']:.1f}",
                *(f"{values[f'{kind}/{name}']:.4f}" for kind in ("weight", "prob_mean", "prob_std", "loss")),
            )
        self._console.print(table)
        if leakage is not None:
            self._console.print(_leakage_table(leakage))

    def _write(self, split: str, iteration: int, values: Mapping[str, float], **more: Any) -> None:
        if self.file is not None and not (split == "validation" and iteration in self._validated):
            metrics = {name: value if math.isfinite(value) else None for name, value in values.items()}
            line = {"iteration": iteration, "split": split, "metrics": metrics, **more}
            with _failures(self.file):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a") as file:
                    file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"amopo-{split}/{name}", value, iteration)
        if self.wandb is not None:
            self.wandb.log({f"amopo-{split}/{name}": value for name, value in values.items()}, iteration)


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MetricsFailed(f"{path} can't be written: {error.strerror}") from error


def _leakage_table(leakage: LeakageMatrix) -> Table:
    table = Table(
        title="margin of a dimension's preference under each prompt, nats/token (accuracy, %)", title_justify="left"
    )
    table.add_column("preference of (records)")
    for name in leakage.prompts:
        table.add_column(name, justify="right")
    for name, margins, accuracies, records in zip(
        leakage.preferences, leakage.margins, leakage.accuracies, leakage.records, strict=True
    ):
        cells = (f"{margin:+.4f} ({100 * share:.1f})" for margin, share in zip(margins, accuracies, strict=True))
        table.add_row(f"{name} ({records:,})", *cells)
    return table


def _parse(line: str) -> dict[str, Any] | None:
    """A line of the file, None for one that was cut off by a kill."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _clock(seconds: float) -> str:
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}"
