"""What the demo shows at its end: the figures before and after, as a table and as plots.

Takes the ``metrics.jsonl`` that training writes into its ``--save`` folder; gives a rich table, a verdict in words, and
PNG files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.table import Table

COLOURS = ("#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by colour-blind eyes, too
LINES = ("-", "--", "-.", ":")
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one pass over the held-out records, by name (``margin/correctness``)."""

    iteration: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunMetrics:
    """A run as its metrics file tells it: the dimensions, the training log, and the first and last evaluation."""

    dimensions: tuple[str, ...]
    steps: tuple[int, ...]
    training: Mapping[str, np.ndarray]  # name -> one value per logged step
    before: Evaluation
    after: Evaluation

    @classmethod
    def load(cls, path: Path) -> RunMetrics:
        """Read a metrics file. Raises ValueError where it lacks an evaluation before training and one after."""
        rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        training = [row for row in rows if row["split"] == "train"]
        evaluations = [Evaluation(row["iteration"], row["metrics"]) for row in rows if row["split"] == "validation"]
        if not training or len(evaluations) < 2 or evaluations[0].iteration != 0:
            raise ValueError(f"{path}: needs training steps and an evaluation before and after them")
        before, after = evaluations[0], evaluations[-1]
        names = training[0]["metrics"]
        return cls(
            dimensions=tuple(name.partition("/")[2] for name in before.metrics if name.startswith("accuracy/")),
            steps=tuple(row["iteration"] for row in training),
            training={name: np.array([row["metrics"][name] for row in training]) for name in names},
            before=before,
            after=after,
        )


def dimensions_that_rose(run: RunMetrics) -> tuple[str, ...]:
    """The dimensions whose held-out preference accuracy is higher after training than before."""
    return tuple(name for name in run.dimensions if _accuracy(run.after, name) > _accuracy(run.before, name))


def verdict(run: RunMetrics, records: int) -> str:
    """Whether preference accuracy rose on every dimension, in words and figures, with the error of the smallest rise.

    ``records`` is the number of held-out records; the standard error is that of the difference of two shares.
    """
    rises = {name: _accuracy(run.after, name) - _accuracy(run.before, name) for name in run.dimensions}
    smallest = min(rises, key=lambda name: rises[name])
    before, after = _accuracy(run.before, smallest), _accuracy(run.after, smallest)
    error = sum(share * (1 - share) / records for share in (before, after)) ** 0.5
    figures = (
        f"smallest change: {smallest.replace('_', ' ')}, {100 * before:.1f} % to {100 * after:.1f} % "
        f"({100 * rises[smallest]:+.1f} points, standard error {100 * error:.1f}, {records} records)"
    )
    fell = [name for name in run.dimensions if name not in dimensions_that_rose(run)]
    if fell:
        return f"Preference accuracy did NOT rise on {', '.join(fell)}; {figures}."
    return f"Preference accuracy rose on all {len(run.dimensions)} dimensions; {figures}."


def _accuracy(evaluation: Evaluation, dimension: str) -> float:
    return evaluation.metrics[f"accuracy/{dimension}"]


def figures_table(run: RunMetrics, records: int) -> Table:
    """Margin, accuracy and weight of each dimension on the held-out records, before and after."""
    table = Table(
        title=f"{records} held-out records, before training and after {run.after.iteration} steps", title_justify="left"
    )
    table.add_column("dimension", no_wrap=True)
    for heading in ("margin\n(nats per token)", "preference accuracy\n(% of records)", "weight\n(share of the loss)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in run.dimensions:
        cells = []
        for kind, scale, form in (("margin", 1, "+.3f"), ("accuracy", 100, ".1f"), ("weight", 1, ".3f")):
            before, after = (scale * evaluation.metrics[f"{kind}/{name}"] for evaluation in (run.before, run.after))
            cells.append(f"{before:{form}} → {after:{form}}")
        table.add_row(name.replace("_", " "), *cells)
    return table


def draw_plots(run: RunMetrics, folder: Path) -> list[Path]:
    """Write loss.png, preferences.png and weights.png; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        return [_loss(run, folder), _preferences(run, folder), _weights(run, folder)]


def _loss(run: RunMetrics, folder: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(run.steps, run.training["loss"], color="#9bbcd6", lw=1, label="training, single steps")
    axes.plot(run.steps, _smooth(run.training["loss"]), color=COLOURS[1], lw=2.2, label="training, running mean")
    held_out = [evaluation.metrics["loss"] for evaluation in (run.before, run.after)]
    axes.plot([0, run.after.iteration], held_out, "o", color=COLOURS[2], ms=9, label="held out, before and after")
    for x, value, side in ((0, held_out[0], "left"), (run.after.iteration, held_out[1], "right")):
        axes.annotate(f"{value:.2f}", (x, value), (0, 9), textcoords="offset points", ha=side, color=COLOURS[2])
    axes.set(title="AMoPO loss", ylabel="loss (nats per record)")
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, folder / "loss.png")


def _preferences(run: RunMetrics, folder: Path) -> Path:
    figure, (margins, accuracies) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    _per_dimension(run, margins, "margin")
    margins.axhline(0, color="black", lw=0.8)
    margins.set(title="margin: chosen above rejected", ylabel="margin (nats per token)")
    _per_dimension(run, accuracies, "accuracy")
    accuracies.axhline(0.5, color="black", lw=0.8, ls=":")
    accuracies.set(title="preference accuracy", ylabel="records with chosen above rejected", ylim=(0.3, 1.0))
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.suptitle("lines: training batches, running mean   ●: held-out records, before and after", fontsize=10)
    return _finish(figure, margins, folder / "preferences.png", also=accuracies)


def _weights(run: RunMetrics, folder: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    _per_dimension(run, axes, "weight")
    axes.axhline(1 / len(run.dimensions), color="black", lw=0.8, ls=":")
    axes.set(title="adaptive weights: each dimension's share of the loss", ylabel="mean weight (fraction)")
    return _finish(figure, axes, folder / "weights.png")


def _per_dimension(run: RunMetrics, axes: Any, kind: str) -> None:
    for number, name in enumerate(run.dimensions):
        colour, style = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
        values = _smooth(run.training[f"{kind}/{name}"])
        axes.plot(run.steps, values, ls=style, color=colour, lw=2, label=name.replace("_", " "))
        ends = [evaluation.metrics[f"{kind}/{name}"] for evaluation in (run.before, run.after)]
        axes.plot([0, run.after.iteration], ends, "o", color=colour, ms=7)


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Mean over up to ``width`` neighbouring values, fewer at the ends."""
    reach = width // 2
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def _finish(figure: Any, axes: Any, path: Path, also: Any = None) -> Path:
    for each in (axes, also):
        if each is not None:
            each.set_xlabel("optimizer step")
            each.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
