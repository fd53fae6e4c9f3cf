"""What another preference dimension costs: step time and memory against D = 1 … 8, ours and the released trainer's.

    python -m benchmarks.dimensions --data preferences.jsonl --tokenizer Qwen2.5-0.5B-Instruct

The same records under one to eight prompts, one record per micro-batch, all in the same rounds. D counts the general
prompt, so D = 1 is that one alone. Dimensions that the file doesn't score get a made-up score: only lengths matter
here. Prints a table and writes a folder with it and a plot.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.comparison import Comparison, Contest, Side, compare
from benchmarks.models import ModelSlice, add_model_arguments, both_models, dtype_of
from benchmarks.records import add_source_arguments, choose_records, source_of, within_vocabulary
from benchmarks.support import COLOURS, MIB, RESULTS, STYLE, command_of, markdown_table, write_results
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.groups import GENERAL

DIMENSIONS = (
    "helpfulness,correctness,instruction_following,completeness,readability,coherence,verbosity"  # and the general one
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_source_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(dimensions=DIMENSIONS)
    add = parser.add_argument
    add("--records", type=int, default=2, help="records of a step (default: %(default)s)")
    add("--short", type=int, default=300, help="most tokens of a response (default: %(default)s)")
    add("--output", type=Path, default=RESULTS / "dimensions", help="folder of the results (default: %(default)s)")
    args = parser.parse_args(arguments)

    model_slice, dtype = ModelSlice.of(args.config, args.parts), dtype_of(args)
    source = source_of(args, args.data)
    source = replace(source, filler=sum(source.source_scale) / 2)
    with tempfile.TemporaryDirectory() as temporary, both_models(model_slice, dtype=dtype) as models:
        folder = Path(temporary, "data")
        groups = source.prepare(folder, most_response_tokens=args.short)
        chosen, _ = choose_records(groups, args.records)
        contests = {}
        for count in range(1, len(groups.dimensions) + 1):
            names = groups.dimensions[:count]
            few = PreparedGroups.open(folder, dimensions=names)
            records = [within_vocabulary(few[index], models.vocab_size) for index in chosen]
            contests[str(count)] = Contest(models, model_slice, records, names, micro_batch_size=1)
        comparisons = compare(contests, args.repetitions, dtype=dtype)

    text = report(model_slice, args.short, comparisons)
    print(text)
    write_results(
        args.output,
        title="What another preference dimension costs",
        command=command_of("benchmarks.dimensions", arguments),
        text=text,
        data={
            "model": model_slice.config,
            "parts": model_slice.parts,
            "dtype": args.dtype,
            "dimensions": [GENERAL, *source.dimensions],
            "by_number_of_dimensions": {count: c.as_json() for count, c in comparisons.items()},
        },
        figures={"dimensions": plot(comparisons)},
    )
    return 0


def cost_per_dimension(
    comparisons: Mapping[str, Comparison], side: Callable[[Comparison], Side], value: Callable[[Side], float]
) -> float:
    """Slope of ``value`` over the number of dimensions, by least squares."""
    counts = [float(count) for count in comparisons]
    return statistics.linear_regression(counts, [value(side(c)) for c in comparisons.values()]).slope


def report(model_slice: ModelSlice, short: int, comparisons: Mapping[str, Comparison]) -> str:
    """The table and what it means."""
    first = comparisons["1"]
    per_record = first.num_records

    def of_ours(comparison: Comparison) -> Side:
        return comparison.ours

    def of_released(comparison: Comparison) -> Side:
        return comparison.released

    def seconds(side: Side) -> float:
        return side.seconds.median / per_record

    def mebibytes(side: Side) -> float:
        return side.extra_bytes / MIB

    table = markdown_table(
        [
            "D",
            "ours, s/record",
            "released, s/record",
            "ratio",
            "operations",
            "ours / D = 1",
            "released / D = 1",
            "ours, MiB",
            "released, MiB",
        ],
        [
            [
                count,
                f"{seconds(c.ours):.3f}",
                f"{seconds(c.released):.3f}",
                c.speedup.text(".2f"),
                f"{c.flop_ratio:.2f}",
                f"{c.ours.seconds.per(first.ours.seconds).median:.2f}",
                f"{c.released.seconds.per(first.released.seconds).median:.2f}",
                f"{mebibytes(c.ours):,.0f}",
                f"{mebibytes(c.released):,.0f}",
            ]
            for count, c in comparisons.items()
        ],
    )
    slopes = {
        (side, value): cost_per_dimension(comparisons, side, value)
        for side in (of_ours, of_released)
        for value in (seconds, mebibytes)
    }
    return f"""Each dimension that is added costs {slopes[of_ours, seconds]:.3f} s and
{slopes[of_ours, mebibytes]:,.0f} MiB per record in ours, {slopes[of_released, seconds]:.3f} s and
{slopes[of_released, mebibytes]:,.0f} MiB in the released trainer's step (least squares over all D): ours takes
{slopes[of_ours, seconds] / slopes[of_released, seconds]:.0%} of its time for it and
{slopes[of_ours, mebibytes] / slopes[of_released, mebibytes]:.0%} of its memory.

{table}
The model is {model_slice}. Responses have at most {short} tokens; a step computes one record per micro-batch, forward
pass, loss and backward pass, without the optimizer. Ratios are of records/s, ours over the released trainer's, taken
round by round: median (smallest – largest); `operations` is the ratio that floating-point operations alone allow.
Memory is the peak beyond weights. D counts the general prompt."""


def plot(comparisons: Mapping[str, Comparison]) -> Figure:
    """Time and memory over the number of dimensions."""
    counts = [int(count) for count in comparisons]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
        for name, colour in (("released", COLOURS[0]), ("ours", COLOURS[1])):
            sides: list[Side] = [getattr(c, name) for c in comparisons.values()]
            records = [c.num_records for c in comparisons.values()]
            middle, low, high = (
                [reduce(side.seconds.values) / n for side, n in zip(sides, records, strict=True)]
                for reduce in (statistics.median, min, max)
            )
            left.plot(counts, middle, marker="o", color=colour, label=name)
            left.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
            right.plot(counts, [side.extra_bytes / MIB for side in sides], marker="o", color=colour, label=name)
        left.set_ylabel("seconds per record")
        right.set_ylabel("peak memory beyond weights, MiB")
        for axes in (left, right):
            axes.set_xlabel("dimensions D, the general prompt included")
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
        figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
