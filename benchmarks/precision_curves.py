"""Does FP8 train as bf16 does? One run of AMoPO on the study's rule-scored task in each precision, all else equal.

    python -m benchmarks.precision_curves --output runs/precision-curves

The model, data, order and noise are those of the study's tuning seed at its large size (``benchmarks/efficacy``). The
curves of loss and margin are laid over each other; in FP8 the check of ``--amopo-fp8-check-interval`` runs along. FP8
needs a GPU with Transformer Engine; without one float32 and bf16 are compared.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.efficacy.arms import AMOPO, BY_NAME, SIZES, STEPS, TUNING_SEED, Setting
from benchmarks.efficacy.runs import train_arm
from benchmarks.efficacy.seeds import make_seed, make_start, seed_folder, start_folder
from benchmarks.support import COLOURS, RESULTS, STYLE, markdown_table, write_results
from megatron_amopo import device
from megatron_amopo.certification.observed_run import metrics
from megatron_amopo.certification.ranks import RankPool
from megatron_amopo.training.fp8 import RECIPE_FLAGS

SETTING = Setting(1.5e-3, MappingProxyType({"beta": 10.0, "gamma": 3.0}))
LOG_INTERVAL = 5
CHECKED = ("--amopo-fp8-check-interval", str(STEPS // 8))
_BF16 = ("--bf16", "--transformer-impl", "transformer_engine")
ON_GPU: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bf16": _BF16,
        "bf16, another order of records": (*_BF16, "--amopo-seed", "12345"),  # how much chance alone does
        "FP8 delayed": (*_BF16, *RECIPE_FLAGS["delayed"], *CHECKED),
        "FP8 tensorwise": (*_BF16, *RECIPE_FLAGS["tensorwise"], *CHECKED),
        "FP8 blockwise": (*_BF16, *RECIPE_FLAGS["blockwise"], *CHECKED),
    }
)
ON_CPU: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"float32": (), "float32, another order of records": ("--amopo-seed", "12345"), "bf16": ("--bf16",)}
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train in every precision and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of data, models and runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "precision_curves", metavar="DIR")
    args = parser.parse_args(arguments)
    output = args.output.resolve()

    with RankPool(1, gpus=device.has_cuda()) as pool:
        if not seed_folder(output, TUNING_SEED).exists():
            pool.run(make_seed, 1, output, TUNING_SEED)
        if not start_folder(output, TUNING_SEED, SIZES[-1].name).exists():
            pool.run(make_start, 1, output, TUNING_SEED, SIZES[-1].name)
        variants = ON_GPU if device.has_cuda() else ON_CPU
        runs = {}
        for number, (name, flags) in enumerate(variants.items()):
            print(f"{name} ({number + 1} of {len(variants)})", flush=True)
            runs[name] = pool.run(curves, 1, output, number, flags)[0]
    text = report(runs)
    print(text)
    write_results(
        args.results,
        title="Loss curves in bf16 and in FP8",
        command="python -m benchmarks.precision_curves --output runs/precision-curves",
        text=text,
        data={"flags": dict(variants), "runs": runs},
        figures={"curves": plot(runs)},
    )
    return 0


def curves(output: Path, number: int, flags: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """A run's lines of metrics, by split."""
    scratch = output / "precision" / str(number)
    further = [*flags, "--log-interval", str(LOG_INTERVAL)]
    run = train_arm(output, SIZES[-1].name, BY_NAME[AMOPO], TUNING_SEED, SETTING, scratch, further)
    return {split: metrics(run, split) for split in ("train", "fp8")}


def _mean_margin(line: Mapping[str, float]) -> float:
    return float(np.mean([value for name, value in line.items() if name.startswith("margin/")]))


def report(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> str:
    """How far each run is from the first, and what its own checks found."""
    first = next(iter(runs.values()))["train"]
    rows = []
    for name, run in runs.items():
        lines = run["train"]
        gaps = [line["loss"] - other["loss"] for line, other in zip(lines, first, strict=True)]
        checks = run["fp8"]
        flips = [value for line in checks for key, value in line.items() if key.startswith("flipped/")]
        rows.append(
            [
                name,
                f"{lines[-1]['loss']:.4f}",
                f"{np.sqrt(np.mean(np.square(gaps))):.4f}",
                f"{_mean_margin(lines[-1]):+.3f}",
                f"{np.mean([line['logp_difference'] for line in checks]):.4f}" if checks else "–",
                f"{100 * np.mean(flips):.2f}" if checks else "–",
            ]
        )
    header = [
        *("", "last loss, nats", "distance of the loss curve from the first row's (RMS), nats"),
        *("last margin, nats/token", "FP8 moves log p by, nats/token", "flipped margins, %"),
    ]
    return f"""AMoPO on the study's task (`benchmarks/efficacy/task.py`), {STEPS} steps from the same model, same
records, order and noise; figures are means over {LOG_INTERVAL} steps. The second row differs from the first in the
order of records and in noise alone: a precision whose distance is smaller than that row's is within what chance does.

{markdown_table(header, rows)}"""


def plot(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> Figure:
    """Loss and mean margin of every run."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
        for colour, (name, run) in zip(COLOURS, runs.items(), strict=False):
            steps = [line["iteration"] for line in run["train"]]
            left.plot(steps, [line["loss"] for line in run["train"]], color=colour, lw=1.2, label=name)
            right.plot(steps, [_mean_margin(line) for line in run["train"]], color=colour, lw=1.2)
        left.set_ylabel("loss, nats")
        right.set_ylabel("mean margin, nats/token")
        for axes in (left, right):
            axes.set_xlabel("step")
        left.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
