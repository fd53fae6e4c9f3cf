"""How a run grows: the best layout and its step time on 16 to 1,024 GPUs, for the batch as it is and for one that grows
with the GPUs. Estimates, like everything here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_amopo.planning.planner import Estimate, Question, plan, ranked, shortage

GPU_COUNTS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Row:
    """One number of GPUs and one batch."""

    gpus: int
    global_batch: int
    best: Estimate | None
    reason: str  # why there is none

    def efficiency(self, first: "Row") -> float | None:
        """Records per second and GPU over those of ``first``."""
        if self.best is None or first.best is None:
            return None
        return (self.best.records_per_second / self.gpus) / (first.best.records_per_second / first.gpus)


@dataclass(frozen=True)
class Growth:
    """Both ways to grow."""

    fixed: tuple[Row, ...]  # the same global batch: strong scaling
    growing: tuple[Row, ...]  # as many records per GPU as on the first: weak scaling


def grow(question: Question, gpu_counts: Sequence[int] = GPU_COUNTS) -> Growth:
    """The question's run on each number of GPUs. The batch that grows is the question's on the fewest."""
    batch = question.options.global_batch
    return Growth(
        fixed=tuple(_row(question, gpus, batch) for gpus in gpu_counts),
        growing=tuple(_row(question, gpus, batch * gpus // gpu_counts[0]) for gpus in gpu_counts),
    )


def _row(question: Question, gpus: int, global_batch: int) -> Row:
    asked = replace(question, gpus=gpus, options=replace(question.options, global_batch=global_batch))
    found = plan(asked)
    if found.fitting:
        return Row(gpus, global_batch, ranked(found.fitting)[0], "")
    reason = shortage(found, asked) or (str(found.refused[0][0]) if found.refused else "no layout")
    return Row(gpus, global_batch, None, reason)


def plot(growth: Growth, title: str) -> Any:
    """A figure of records per second over GPUs, and of what share of proportional growth that is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rate, share = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=10)
    for rows, name, colour in (
        (growth.growing, "batch grows with the GPUs", "#0072b2"),
        (growth.fixed, "same global batch", "#d55e00"),
    ):
        found = [(row, row.best) for row in rows if row.best is not None]
        if not found:
            continue
        gpus = [row.gpus for row, _ in found]
        rate.plot(gpus, [best.records_per_second for _, best in found], "o-", color=colour, label=name)
        share.plot(gpus, [row.efficiency(found[0][0]) for row, _ in found], "o-", color=colour, label=name)
    rate.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="records/s (estimate)")
    share.set(xscale="log", ylim=(0, 1.1), xlabel="GPUs", ylabel="records/s per GPU, over the fewest GPUs")
    for axis in (rate, share):
        axis.set_xticks([row.gpus for row in growth.fixed], [f"{row.gpus:,}" for row in growth.fixed])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if rate.get_legend_handles_labels()[0]:
        rate.legend(frameon=False, fontsize=8)
    return figure
