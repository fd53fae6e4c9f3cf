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


def figures_table(run: RunMetrics, records: int, sampled: Mapping[str, tuple[float, float]]) -> Table:
    """Each dimension before and after training: margin, accuracy and weight on the held-out records, and ``sampled``,
    the mean rule scores of answers that the model before and the model after gave itself.
    """
    table = Table(
        title=f"Before training → after {run.after.iteration} steps; {records} held-out records", title_justify="left"
    )
    table.add_column("dimension")
    for heading in ("margin,\nnats/token", "preference\naccuracy, %", "weight,\nfraction", "own answers,\nscore 1-5"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in run.dimensions:
        cells = []
        for kind, scale, form in (("margin", 1, "+.2f"), ("accuracy", 100, ".1f"), ("weight", 1, ".3f")):
            before, after = (scale * evaluation.metrics[f"{kind}/{name}"] for evaluation in (run.before, run.after))
            cells.append(f"{before:{form}} → {after:{form}}")
        cells.append("{:.2f} → {:.2f}".format(*sampled[name]) if name in sampled else "")
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
    for x, value in ((0, held_out[0]), (run.after.iteration, held_out[1])):
        axes.annotate(f"{value:.2f}", (x, value), (9, 6), textcoords="offset points", color=COLOURS[2], weight="bold")
    axes.set_xlim(-0.04 * run.after.iteration, 1.1 * run.after.iteration)
    axes.set(title="AMoPO loss, with the SFT term", ylabel="loss (nats per record)")
    axes.set_ylim(bottom=0)
    _step_axis(axes)
    axes.legend(frameon=False, fontsize=10)
    return _save(figure, folder / "loss.png")


def _preferences(run: RunMetrics, folder: Path) -> Path:
    figure, ((margin_lines, accuracy_lines), (margin_bars, accuracy_bars)) = plt.subplots(
        2, 2, figsize=(11, 8), layout="constrained"
    )
    _lines(run, margin_lines, "margin")
    margin_lines.set(title="Margin while training", ylabel="margin (nats per token)")
    margin_lines.legend(frameon=False, fontsize=10)
    _lines(run, accuracy_lines, "accuracy")
    accuracy_lines.set(title="Preference accuracy while training", ylim=(0.3, 1.0))
    _bars(run, margin_bars, "margin", "{:+.2f}")
    margin_bars.set(title="Margin on held-out records", ylabel="margin (nats per token)")
    margin_bars.margins(y=0.25)
    margin_bars.legend(frameon=False, fontsize=10, ncols=2, loc="upper center")
    _bars(run, accuracy_bars, "accuracy", "{:.0%}")
    accuracy_bars.set(title="Preference accuracy on held-out records", ylim=(0, 1.05))
    for axes in (accuracy_lines, accuracy_bars):
        axes.axhline(0.5, color="black", lw=0.8, ls=":")
        axes.set_ylabel("records with chosen above rejected")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    figure.suptitle("lines: training batches, running mean     ●: held-out records, before and after", fontsize=10)
    return _save(figure, folder / "preferences.png")


def _weights(run: RunMetrics, folder: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    _lines(run, axes, "weight")
    equal = 1 / len(run.dimensions)
    axes.axhline(equal, color="black", lw=0.8, ls=":")
    axes.annotate("equal", (1.01, equal), xycoords=("axes fraction", "data"), va="center", fontsize=10)
    axes.set(title="Adaptive weights: each dimension's share of the loss", ylabel="mean weight (fraction)")
    axes.set_ylim(0.5 * equal, 1.5 * equal)
    axes.legend(frameon=False, fontsize=10, ncols=2, loc="lower center", title="● held-out records, before and after")
    return _save(figure, folder / "weights.png")


def _lines(run: RunMetrics, axes: Any, kind: str) -> None:
    """One line per dimension over the training steps, and its held-out figures as dots at both ends."""
    for number, name in enumerate(run.dimensions):
        colour, line = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
        values = _smooth(run.training[f"{kind}/{name}"])
        axes.plot(run.steps, values, ls=line, color=colour, lw=2, label=name.replace("_", " "))
        ends = [evaluation.metrics[f"{kind}/{name}"] for evaluation in (run.before, run.after)]
        axes.plot([0, run.after.iteration], ends, "o", color=colour, ms=6)
    _step_axis(axes)


def _bars(run: RunMetrics, axes: Any, kind: str, form: str) -> None:
    """Two bars per dimension, before and after, with their figures written on them."""
    places = np.arange(len(run.dimensions))
    for offset, evaluation, colour, label in (
        (-0.2, run.before, "#b8b8b8", "before"),
        (0.2, run.after, COLOURS[1], "after"),
    ):
        heights = [evaluation.metrics[f"{kind}/{name}"] for name in run.dimensions]
        bars = axes.bar(places + offset, heights, 0.38, color=colour, label=label)
        axes.bar_label(bars, [form.format(height) for height in heights], fontsize=9, padding=2)
    axes.set_xticks(places, [name.replace("_", "\n") for name in run.dimensions])
    axes.grid(axis="x", visible=False)


def _smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """Mean over up to ``width`` neighbouring values, fewer at the ends."""
    reach = width // 2
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def _step_axis(axes: Any) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
