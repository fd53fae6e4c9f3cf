"""How many tokens a step computes per record: the released trainer's padded rows against packed groups.

    python -m benchmarks.tokens --data preferences.jsonl more_preferences.jsonl --tokenizer Qwen2.5-0.5B-Instruct

For each file, with its responses whole and cut: rows padded to the longest of their record, and of a micro-batch of
four; groups with each prompt packed once for its two responses; the same with the start that all prompts of a record
share packed once, too, under prompts that put the question first; and the rows that the head needs. All prepared
records count. Prints a table and writes a folder with it and a plot.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.records import Source, add_source_arguments, choose_records, source_of
from benchmarks.support import COLOURS, RESULTS, STYLE, command_of, markdown_table, write_results
from megatron_amopo.data.prompts import DEFAULT_STYLE

QUESTION_FIRST = "question_first"
MICRO_BATCH = 4


@dataclass(frozen=True)
class TokenCounts:
    """Means per record."""

    records: int
    padded: float
    padded_together: float  # in micro-batches of four
    packed: float
    tree: float  # under prompts that put the question first
    tree_padded: float  # the released step under those prompts
    response: float


#: What the plot shows, in its order.
BARS = {
    "padded_together": f"padded, {MICRO_BATCH} records together",
    "padded": "padded, each record",
    "packed": "shared prompts",
    "tree": "shared question",
    "response": "rows through our head",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Count for all files and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_source_arguments(parser, several_files=True)
    add = parser.add_argument
    add("--short", type=int, default=300, help="most tokens of a short response (default: %(default)s)")
    add("--output", type=Path, default=RESULTS / "tokens", help="folder of the results (default: %(default)s)")
    args = parser.parse_args(arguments)

    counts: dict[str, TokenCounts] = {}
    for path in args.data:
        source = source_of(args, path)
        label = "/".join(path.with_suffix("").parts[-2:])
        counts[label] = count(source, None)
        counts[f"{label}, ≤ {args.short}"] = count(source, args.short)
    text = report(counts, args.short)
    print(text)
    write_results(
        args.output,
        title="Tokens per record, packed and padded",
        command=command_of("benchmarks.tokens", arguments),
        text=text,
        data={"tokens_per_record": {label: asdict(value) for label, value in counts.items()}},
        figures={"tokens": plot(counts)},
    )
    return 0


def count(source: Source, most_response_tokens: int | None) -> TokenCounts:
    """Means over all records of a file."""
    with tempfile.TemporaryDirectory() as folder:
        # Only lengths are counted: scores that a file lacks are made up.
        filled = replace(source, filler=sum(source.source_scale) / 2)
        groups = filled.prepare(Path(folder, "plain"), most_response_tokens=most_response_tokens)
        question_first = replace(filled, prompts=QUESTION_FIRST)
        tree = question_first.prepare(Path(folder, "tree"), most_response_tokens=most_response_tokens)
        statistics = choose_records(groups, MICRO_BATCH)[1]
        return TokenCounts(
            records=len(groups),
            padded=statistics.padded,
            padded_together=statistics.padded_together,
            packed=float(np.mean(groups.packed_tokens("responses"))),
            tree=float(np.mean(tree.packed_tokens("tree"))),
            tree_padded=choose_records(tree, 1)[1].padded,
            response=statistics.response,
        )


def report(counts: Mapping[str, TokenCounts], short: int) -> str:
    """The table and what it means."""
    table = markdown_table(
        ["responses", "records", *BARS.values(), "padded / shared prompts", "padded / shared question"],
        [
            [
                label,
                c.records,
                *(f"{getattr(c, name):,.0f}" for name in BARS),
                f"{c.padded / c.packed:.2f}",
                f"{c.tree_padded / c.tree:.2f}",
            ]
            for label, c in counts.items()
        ],
    )
    return f"""Means per record over all prepared records, as they are and with responses cut to {short} tokens. The
released trainer computes the padded tokens, and sends all of them through the head; ours computes the packed ones, and
sends only the rows that predict response tokens through the head. Prompts are of the style `{DEFAULT_STYLE}`, for the
shared question of the style `{QUESTION_FIRST}`, which changes what the model reads. Scores that a file lacks are made
up, since only lengths count.

{table}"""


def plot(counts: Mapping[str, TokenCounts]) -> Figure:
    """Bars per file."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(2.2 + 1.6 * len(counts), 3.6))
        width = 0.8 / len(BARS)
        for number, ((name, label), colour) in enumerate(zip(BARS.items(), COLOURS, strict=False)):
            values = [getattr(c, name) for c in counts.values()]
            positions = [place + (number - (len(BARS) - 1) / 2) * width for place in range(len(counts))]
            axes.bar(positions, values, width * 0.95, label=label, color=colour)
        axes.set_xticks(range(len(counts)), [label.replace("/", "/\n").replace(", ", ",\n") for label in counts])
        axes.set_ylabel("tokens per record")
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
