"""The planner's step times beside those of published runs.

    python -m benchmarks.planner

For each run of ``published_runs.py``: the step time that its throughput means, the estimate with the constants that
everybody gets (``megatron_amopo/planning/efficiency.py``), and the error. The two calibrated constants are fitted once
more, without each model's runs in turn, and under other choices of the constant that these runs can't tell from them.
Takes no GPU and measures nothing. Prints tables and writes a folder with them and a plot.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.published_runs import RUNS, PublishedRun
from benchmarks.support import COLOURS, RESULTS, STYLE, command_of, markdown_table, write_results
from megatron_amopo.planning.efficiency import DEFAULT, Efficiency
from megatron_amopo.planning.hardware import gpu
from megatron_amopo.planning.layout import Layout, Options, Software
from megatron_amopo.planning.planner import model_flops
from megatron_amopo.planning.timing import StepTime, TimeModel
from megatron_amopo.planning.work import StepWork, sequences

TARGET = 0.15
_GRID = [number / 200 for number in range(80, 181)]  # 0.40 to 0.90
_ROUNDS = 4  # the two constants hardly depend on each other


@dataclass(frozen=True)
class Comparison:
    """One run and its estimates, seconds of a step."""

    run: PublishedRun
    estimate: StepTime
    left_out: float | None  # with constants that no run of this model had a part in; None where none ever had

    @property
    def error(self) -> float:
        return self.estimate.total / self.run.step_seconds - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "planner", help="folder of the results (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    found, fitted = compare(), calibrate(_calibration())
    text = report(found, fitted)
    print(text)
    write_results(
        args.output,
        title="The planner's step times beside published ones",
        command=command_of("benchmarks.planner", arguments),
        text=text,
        data={
            "efficiency": asdict(DEFAULT),
            "fitted": {"gemm_bf16": fitted.gemm_bf16, "gemm_fp8": fitted.gemm_fp8},
            "runs": [
                {
                    **asdict(one.run),
                    "published_step_seconds": one.run.step_seconds,
                    "estimated_step_seconds": one.estimate.total,
                    "estimated_parts_seconds": one.estimate.parts(),
                    "error": one.error,
                    "estimated_step_seconds_left_out": one.left_out,
                }
                for one in found
            ],
        },
        figures={"planner": plot(found)},
    )
    return 0


def estimate(run: PublishedRun, efficiency: Efficiency) -> StepTime:
    """The planner's time for a run: tensor-parallel communication overlapped and keys and values passed around, as
    these programs do it, gradients in bf16, attention of FlashAttention-3's speed."""
    return TimeModel(
        run.sizes,
        gpu(run.gpu),
        Layout(tp=run.tp, cp=run.cp, dp=run.dp, pp=run.pp, chunks=run.chunks, count_ends=run.count_ends),
        Options(run.global_batch, run.micro_batch, run.precision, bf16_gradients=True, attention="fa3"),
        software=Software(
            tp_overlap=True,
            ring_context=True,
            fsdp=run.fsdp,
            trains_weights=not run.adapters,
            stores_logits=True,
        ),
        efficiency=efficiency,
    ).step(_work(run))


def calibrate(runs: Sequence[PublishedRun], start: Efficiency = DEFAULT) -> Efficiency:
    """``start`` with the constants of matrix products that have the least squares of log(estimate / published)."""

    def loss(efficiency: Efficiency) -> float:
        return sum(math.log(estimate(run, efficiency).total / run.step_seconds) ** 2 for run in runs)

    fitted = start
    for _ in range(_ROUNDS):
        fitted = min((replace(fitted, gemm_bf16=value) for value in _GRID), key=loss)
        fitted = min((replace(fitted, gemm_fp8=value) for value in _GRID), key=loss)
    return fitted


def compare() -> list[Comparison]:
    """All runs; those of the calibration also with what other models' alone calibrate."""
    found = []
    for run in RUNS:
        left_out = None
        others = [other for other in _calibration() if other.model != run.model]
        # Without it nothing would say anything about bf16.
        if run.use == "calibration" and any(other.precision == run.precision for other in others):
            left_out = estimate(run, calibrate(others)).total
        found.append(Comparison(run, estimate(run, DEFAULT), left_out))
    return found


def _calibration() -> list[PublishedRun]:
    return [run for run in RUNS if run.use == "calibration"]


def _work(run: PublishedRun) -> StepWork:
    micro_batches = run.global_batch // (run.micro_batch * run.dp)
    return sequences(length=run.sequence, micro_batch=run.micro_batch, micro_batches=micro_batches)


def _tflops(run: PublishedRun, seconds: float) -> float:
    work = _work(run)
    total = model_flops(run.sizes, work.mean) * work.micro_batches * run.dp
    # Adapters need no gradients of weights: two thirds.
    return total * (2 / 3 if run.adapters else 1) / run.gpus / seconds / 1e12


def report(found: Sequence[Comparison], fitted: Efficiency) -> str:
    """The tables and what they say."""
    listed, others = [one for one in found if one.run.listed], [one for one in found if not one.run.listed]
    held_out = [one for one in found if one.run.use == "held out"]
    within = _within(listed)
    left_out = [one for one in found if one.left_out is not None]
    lines = "\n".join(f"- {one.run}: {one.run.why}." for one in found if one.run.why)
    mean = sum(one.error for one in held_out) / len(held_out)
    return (
        f"Of {len(listed)} runs of the list that was set as the target, {within} are estimated within {TARGET:.0%} of "
        f"their step time; of {len(held_out)} held-out runs, {_within(held_out)}, with a mean error of "
        f"{_mean_error(held_out):.1%} without signs and {mean:+.1%} with them: what is left out of the estimates, such "
        "as ranks that wait for the slowest, makes real runs slower. One set of constants for all rows; nothing is "
        "fitted to a row. Runs are estimated with their own software's options (tensor-parallel communication "
        "overlapped, context parallelism as a ring, logits stored, FlashAttention-3, gradients in bf16), not with "
        "this project's. TFLOP/s are of the model's operations, causal pairs counted once, in both columns; the "
        f"sources count in slightly different ways.\n\n{_table(listed)}\n"
        "More runs of the same kind, none of which any constant was chosen by; several are the same configuration "
        "under another release of the software, which shows how far apart such figures lie:\n\n"
        f"{_table(others)}\n"
        f"Calibrated are two constants, on the runs marked so. Fitted anew they are {fitted.gemm_bf16:.3f} of bf16's "
        f"peak and {fitted.gemm_fp8:.3f} of FP8's; committed are {DEFAULT.gemm_bf16:.2f} and {DEFAULT.gemm_fp8:.2f}. "
        "bf16 rests on a single run, so only the held-out GPT-3 rows check it. With constants that other models' runs "
        f"alone give:\n\n{_left_out_table(left_out)}\n"
        "How much communication beside computation costs can't be read from these runs; fitted under other choices of "
        f"that constant:\n\n{_choices_table()}\n"
        f"Where the estimates say the time goes, % of a step:\n\n{_parts_table(listed)}\n"
        f"Not described:\n\n{lines}\n"
    )


def _within(found: Sequence[Comparison]) -> int:
    return sum(abs(one.error) <= TARGET for one in found)


def _left_out_table(found: Sequence[Comparison]) -> str:
    rows = []
    for one in found:
        assert one.left_out is not None
        published = one.run.step_seconds
        rows.append([one.run, f"{published:.2f}", f"{one.left_out:.2f}", f"{one.left_out / published - 1:+.1%}"])
    return markdown_table(["run", "published, s", "its model left out, s", "error"], rows)


def _choices_table() -> str:
    held_out = [run for run in RUNS if run.use == "held out"]
    rows = []
    for exposed in (0.0, DEFAULT.exposed, 0.4):
        fitted = calibrate(_calibration(), replace(DEFAULT, exposed=exposed))
        errors = [
            [abs(estimate(run, fitted).total / run.step_seconds - 1) for run in runs]
            for runs in (_calibration(), held_out)
        ]
        means = [f"{sum(own) / len(own):.1%}" for own in errors]
        rows.append([f"{exposed:.0%} of its time", f"{fitted.gemm_bf16:.3f}", f"{fitted.gemm_fp8:.3f}", *means])
    return markdown_table(["overlapped communication costs", "bf16", "FP8", "error, calibration", "held out"], rows)


def _mean_error(found: Sequence[Comparison]) -> float:
    return sum(abs(one.error) for one in found) / len(found)


def _table(found: Sequence[Comparison]) -> str:
    header = ["run", "precision", "batch", "published, s", "estimate, s", "published, TFLOP/s", "estimate, TFLOP/s",
              "error of step time", "use", "source"]  # fmt: skip
    rows = [
        [one.run, one.run.precision, f"{one.run.global_batch:,} × {one.run.sequence:,}",
         f"{one.run.step_seconds:.2f}", f"{one.estimate.total:.2f}", f"{_tflops(one.run, one.run.step_seconds):.0f}",
         f"{_tflops(one.run, one.estimate.total):.0f}", f"{one.error:+.1%}", one.run.use, one.run.source]
        for one in found
    ]  # fmt: skip
    return markdown_table(header, rows)


def _parts_table(found: Sequence[Comparison]) -> str:
    names = [name for name in found[0].estimate.parts() if any(one.estimate.parts()[name] for one in found)]
    rows = [[one.run, *(f"{one.estimate.parts()[name] / one.estimate.total:.1%}" for name in names)] for one in found]
    return markdown_table(["run", *(name.replace("_", " ") for name in names)], rows)


def plot(found: Sequence[Comparison]) -> Figure:
    """Estimated over published step times, with the errors."""
    with plt.rc_context(STYLE):
        figure, (times, errors) = plt.subplots(1, 2, figsize=(12, 6), width_ratios=(1, 1.2), layout="constrained")
        shown = {"calibration": COLOURS[1], "held out": COLOURS[2], "not described": COLOURS[0]}
        for use, colour in shown.items():
            own = [one for one in found if one.run.use == use]
            times.plot(
                [one.run.step_seconds for one in own], [one.estimate.total for one in own], "o", color=colour, label=use
            )
        ends = [min(one.run.step_seconds for one in found) / 1.5, max(one.run.step_seconds for one in found) * 1.5]
        times.plot(ends, ends, "-", color="#888888", linewidth=1)
        times.fill_between(ends, [x * (1 - TARGET) for x in ends], [x * (1 + TARGET) for x in ends], alpha=0.15)
        times.set(xscale="log", yscale="log", xlabel="published step time, s", ylabel="estimated step time, s")
        times.legend(frameon=False, title=f"band: ± {TARGET:.0%}")

        places = range(len(found))
        errors.barh(places, [100 * one.error for one in found], color=[shown[one.run.use] for one in found])
        errors.axvspan(-100 * TARGET, 100 * TARGET, alpha=0.12)
        errors.set_yticks(places, [f"{one.run} ({_release(one.run)})" for one in found], fontsize=7)
        errors.set(xlabel="error of step time, %", xlim=(-80, 30))
        errors.invert_yaxis()
    return figure


def _release(run: PublishedRun) -> str:
    """The end of its source, which tells runs of one configuration apart."""
    return run.source.partition(";")[0].rpartition(", ")[-1]


if __name__ == "__main__":
    sys.exit(main())
