"""One training step of ours against the released trainer's, on the same records with the same weights.

    python -m benchmarks.step --data ../shared/data/hellobench/train.jsonl --tokenizer ../shared/data/qwen2.5-tokenizer

Three cases: responses as they are, one record per micro-batch; responses cut to 300 tokens, one record per micro-batch;
the same, all records in one micro-batch. For each, the ratio of records/s that floating-point operations alone allow
and the ratio measured, where our time goes, how far that is from the machine's own rate of matrix products, and both
sides' peak memory. The model is an even slice of Qwen2.5-0.5B, or of the one that ``--config`` describes; see
``benchmarks/models.py``. Prints tables and writes a folder with them and a plot.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.comparison import Comparison, Contest, compare
from benchmarks.models import Models, ModelSlice, add_model_arguments, both_models, dtype_of
from benchmarks.profiling import CATEGORIES, TimeShares, time_shares
from benchmarks.records import LengthStatistics, add_source_arguments, choose_records, source_of, within_vocabulary
from benchmarks.support import (
    COLOURS,
    MIB,
    RESULTS,
    STYLE,
    Samples,
    command_of,
    device_peak_tflops,
    markdown_table,
    write_results,
)
from megatron_amopo.data.dataset import PreparedGroups

#: The measured ratio should be at least this much above that of the operations.
TARGET = 1.15


@dataclass(frozen=True)
class Case:
    """Records of one kind in micro-batches of one size."""

    name: str
    responses: str  # which data set
    micro_batch_size: int


@dataclass(frozen=True)
class Result:
    """A case, measured."""

    comparison: Comparison
    shares: TimeShares  # of our time
    chosen: LengthStatistics
    data_set: LengthStatistics

    def as_json(self) -> dict[str, Any]:
        """Everything measured."""
        return {
            **self.comparison.as_json(),
            "shares_of_our_time": asdict(self.shares),
            "lengths_of_chosen_records": asdict(self.chosen),
            "lengths_of_data_set": asdict(self.data_set),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_source_arguments(parser)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--records", type=int, default=4, help="short records of a step (default: %(default)s)")
    add("--long-records", type=int, default=2, help="records of a step with whole responses (default: %(default)s)")
    add("--short", type=int, default=300, help="most tokens of a short response (default: %(default)s)")
    add(
        "--peak-tflops",
        type=float,
        help="the device's peak rate in --dtype, 10¹² operations/s, to state shares of (default: its data sheet's)",
    )
    add("--output", type=Path, default=RESULTS / "step", help="folder of the results (default: %(default)s)")
    args = parser.parse_args(arguments)

    model_slice, dtype = ModelSlice.of(args.config, args.parts), dtype_of(args)
    cases = [
        Case("whole responses, micro-batch 1", "whole", 1),
        Case(f"responses ≤ {args.short} tokens, micro-batch 1", "short", 1),
        Case(f"responses ≤ {args.short} tokens, micro-batch {args.records}", "short", args.records),
    ]
    with tempfile.TemporaryDirectory() as folder:
        source = source_of(args, args.data)
        groups = {
            "whole": source.prepare(Path(folder, "whole")),
            "short": source.prepare(Path(folder, "short"), most_response_tokens=args.short),
        }
        counts = {"whole": args.long_records, "short": args.records}
        with both_models(model_slice, dtype=dtype) as models:
            results = measure(models, model_slice, cases, groups, counts, args.repetitions, dtype)
            layers = models.transformer_impl
    peak = device_peak_tflops(args.peak_tflops, dtype)
    text = report(f"{model_slice}; ours has {layers} layers, in {args.dtype}", results, peak)
    print(text)
    write_results(
        args.output,
        title="A training step, ours and the released trainer's",
        command=command_of("benchmarks.step", arguments),
        text=text,
        data={
            "model": model_slice.config,
            "parts": model_slice.parts,
            "dtype": args.dtype,
            "transformer_impl": layers,
            "cases": {name: result.as_json() for name, result in results.items()},
        },
        figures={"step": plot(results)},
    )
    return 0


def measure(
    models: Models,
    model_slice: ModelSlice,
    cases: Sequence[Case],
    groups: Mapping[str, PreparedGroups],
    counts: Mapping[str, int],
    repetitions: int,
    dtype: torch.dtype,
) -> dict[str, Result]:
    """All cases by name, each on as many records as ``counts`` says of its responses."""
    choices = {name: choose_records(groups[name], counts[name]) for name in groups}
    contests = {}
    for case in cases:
        chosen, _ = choices[case.responses]
        records = [within_vocabulary(groups[case.responses][index], models.vocab_size) for index in chosen]
        dimensions = groups[case.responses].dimensions
        contests[case.name] = Contest(models, model_slice, records, dimensions, case.micro_batch_size)
    comparisons = compare(contests, repetitions, dtype=dtype)
    results = {}
    for case in cases:
        chosen, expected = choices[case.responses]
        results[case.name] = Result(
            comparisons[case.name],
            time_shares(models.megatron, contests[case.name].ours),
            LengthStatistics.of(groups[case.responses].lengths[chosen]),
            expected,
        )
    return results


def report(model: str, results: Mapping[str, Result], peak_tflops: float | None = None) -> str:
    """Tables and what they mean; ``peak_tflops`` as the flag of this name."""
    comparisons = {name: result.comparison for name, result in results.items()}
    speed = markdown_table(
        ["", "ours, records/s", "released, records/s", "ratio", "ratio of operations", "ratio / operations"],
        [
            [
                name,
                f"{c.records_per_second(c.ours):.3g}",
                f"{c.records_per_second(c.released):.3g}",
                c.speedup.text(".2f"),
                f"{c.flop_ratio:.2f}",
                f"{c.speedup.median / c.flop_ratio:.2f}",
            ]
            for name, c in comparisons.items()
        ],
    )
    memory = markdown_table(
        ["", "ours, MiB", "released, MiB", "loss, ours", "loss, released"],
        [
            [
                name,
                f"{c.ours.extra_bytes / MIB:,.0f}",
                f"{c.released.extra_bytes / MIB:,.0f}",
                f"{c.ours.loss:.7f}",
                f"{c.released.loss:.7f}",
            ]
            for name, c in comparisons.items()
        ],
    )
    time = markdown_table(
        ["", *CATEGORIES, "step, of matmul rate", "released, of matmul rate"],
        [
            [
                name,
                *(f"{result.shares.categories[category]:.0%}" for category in CATEGORIES),
                *(
                    f"{rate / result.comparison.matmul_flops_per_second.median:.0%}"
                    for rate in result.comparison.flops_per_second
                ),
            ]
            for name, result in results.items()
        ],
    )
    rates = markdown_table(
        ["TFLOP/s", "ours", "released", "matmul", *(["ours, of the peak"] if peak_tflops else [])],
        [
            [
                name,
                *(f"{rate / 1e12:.3g}" for rate in c.flops_per_second),
                Samples(tuple(rate / 1e12 for rate in c.matmul_flops_per_second.values)).text(),
                *([f"{c.flops_per_second[0] / 1e12 / peak_tflops:.0%}"] if peak_tflops else []),
            ]
            for name, c in comparisons.items()
        ],
    )
    rest = "\n".join(
        f"- {name}: " + ", ".join(f"`{operator}` {share:.1%}" for operator, share in result.shares.rest.items())
        for name, result in results.items()
    )
    operations = markdown_table(
        ["GFLOP per record", "layers", "attention", "head", "released: layers", "attention", "head"],
        [
            [
                name,
                *(
                    f"{part / c.num_records / 1e9:,.0f}"
                    for flops in (c.ours.flops, c.released.flops)
                    for part in (flops.layers, flops.attention, flops.head)
                ),
            ]
            for name, c in comparisons.items()
        ],
    )
    lengths = markdown_table(
        [
            "tokens per record, chosen records (data set)",
            "padded",
            "padded, in micro-batch",
            "each prompt once",
            "response rows",
        ],
        [
            [
                name,
                *(
                    f"{mine:,.0f} ({theirs:,.0f})"
                    for mine, theirs in zip(
                        asdict(result.chosen).values(), asdict(result.data_set).values(), strict=True
                    )
                ),
            ]
            for name, result in results.items()
        ],
    )
    reached = [c.speedup.median >= TARGET * c.flop_ratio for c in comparisons.values()]
    return f"""The model is {model}. A step is forward pass, loss and backward pass of all records, without the
optimizer. Ratios are of records/s, ours over the released trainer's, taken round by round: median (smallest – largest).
The ratio of operations is what floating-point operations alone allow (`benchmarks/flops.py`); the target is {TARGET}
times that, reached in {sum(reached)} of {len(reached)} cases.

{speed}
Peak memory beyond weights, and the loss that both compute:

{memory}
Where our time goes, by torch's profiler (`benchmarks/profiling.py`), and floating-point operations per second of the
whole step as a share of those of a plain matrix product of a layer's shape, timed in the same rounds:

{time}
The largest operators of the rest, in shares of the whole step:

{rest}

Rates of whole steps, and of the plain matrix product, whose spread says how steady the machine was:

{rates}
Operations:

{operations}
Records are a seeded choice whose lengths are near the data set's means:

{lengths}"""


def plot(results: Mapping[str, Result]) -> Figure:
    """Ratios against those of operations; shares of our time."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(3, 2))
        names = [name.replace(" ≤", "\n≤").replace(", ", ",\n") for name in results]
        positions = range(len(results))
        comparisons = [result.comparison for result in results.values()]
        flop_ratios = [c.flop_ratio for c in comparisons]
        medians = [c.speedup.median for c in comparisons]
        spread = [
            [c.speedup.median - min(c.speedup.values) for c in comparisons],
            [max(c.speedup.values) - c.speedup.median for c in comparisons],
        ]
        left.bar([p - 0.2 for p in positions], flop_ratios, 0.38, label="operations alone", color=COLOURS[0])
        left.bar(
            [p + 0.2 for p in positions], medians, 0.38, yerr=spread, capsize=3, label="measured", color=COLOURS[1]
        )
        left.axhline(1, color="black", linewidth=0.8)
        left.set_xticks(list(positions), names)
        left.set_ylabel("records/s, ours over released")
        left.legend(frameon=False)
        begin = [0.0] * len(results)
        for category, colour in zip(CATEGORIES, COLOURS[1:], strict=False):
            shares = [result.shares.categories[category] for result in results.values()]
            right.barh(list(positions), shares, left=begin, label=category, color=colour)
            begin = [b + share for b, share in zip(begin, shares, strict=True)]
        right.set_yticks(list(positions), names)
        right.invert_yaxis()
        right.set_xlabel("share of our time")
        right.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0), columnspacing=1)
        figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
