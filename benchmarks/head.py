"""The fused head against plain log-softmax, and Liger-Kernel's fused loss where it is installed: time and memory.

    python -m benchmarks.head --rows 1024 2048 4096 --vocabulary 152064 --tp 1 8 --hidden 896 --dtype bfloat16

Forward and backward pass from hidden states to their gradient and the weight's, over rows × vocabulary × tensor
parallelism. Plain builds full float32 logits, takes their log-softmax and picks the targets; its three arrays of rows ×
vocabulary are skipped where they don't fit ``--most-gib``. Liger's loss computes gradients for an incoming one of 1 and
needs CUDA. Prints a table and writes a folder with it and a plot.
"""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.support import (
    COLOURS,
    GIB,
    MIB,
    RESULTS,
    STYLE,
    Samples,
    command_of,
    markdown_table,
    peak_extra_memory,
    time_interleaved,
    write_results,
)
from megatron_amopo import device
from megatron_amopo.model import response_logps

PLAIN, FUSED, MAIN_GRAD, LIGER = "plain", "fused", "fused, into main_grad", "Liger-Kernel"


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison."""

    rows: int
    columns: int  # of the vocabulary, on this rank
    tp: int
    hidden: int

    @property
    def logits_bytes(self) -> int:
        """Of the whole logits in float32."""
        return 4 * self.rows * self.columns


@dataclass(frozen=True)
class Result:
    """A candidate, measured."""

    seconds: Samples
    extra_bytes: int  # at the peak, beyond inputs and gradients


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[1024, 4096], help="rows that predict a token (default: %(default)s)")
    add("--vocabulary", type=int, nargs="+", default=[152_064], help="vocabulary rows (default: %(default)s)")
    add("--tp", type=int, nargs="+", default=[1, 8], help="tensor-parallel ranks, one of them (default: %(default)s)")
    add("--hidden", type=int, default=896, help="hidden size (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="(default: %(default)s)")
    add("--repetitions", type=int, default=5, help="rounds (default: %(default)s)")
    add("--most-gib", type=float, help="memory that plain may take (default: half of what is free)")
    add("--output", type=Path, default=RESULTS / "head", help="folder of the results (default: %(default)s)")
    args = parser.parse_args(arguments)

    dtype = getattr(torch, args.dtype)
    most_bytes = _free_memory() / 2 if args.most_gib is None else args.most_gib * GIB
    results: dict[Case, dict[str, Result]] = {}
    for rows, vocabulary, tp in itertools.product(args.rows, args.vocabulary, args.tp):
        case = Case(rows, vocabulary // tp, tp, args.hidden)
        results[case] = measure(case, dtype, args.repetitions, most_bytes)
        print(_lines({case: results[case]}), flush=True)
    text = report(results, args.dtype)
    write_results(
        args.output,
        title="The fused head against plain log-softmax",
        command=command_of("benchmarks.head", arguments),
        text=text,
        data={
            "dtype": args.dtype,
            "cases": [
                {**asdict(case), "candidates": {name: asdict(one) for name, one in by_name.items()}}
                for case, by_name in results.items()
            ],
        },
        figures={"head": plot(results)},
    )
    return 0


def measure(case: Case, dtype: torch.dtype, repetitions: int, most_bytes: float) -> dict[str, Result]:
    """All candidates of a case that fit."""
    runs = candidates(case, dtype)
    if 3 * case.logits_bytes > most_bytes:
        del runs[PLAIN]
    seconds = time_interleaved(runs, repetitions)
    # What a run returns is alive at its peak.
    returned = {name: sum(gradient.nbytes for gradient in run()) for name, run in runs.items()}
    return {name: Result(seconds[name], max(0, peak_extra_memory(run) - returned[name])) for name, run in runs.items()}


def candidates(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward pass by name; each gives the gradients that it has made new memory for."""
    generator = torch.Generator().manual_seed(0)
    where: dict[str, Any] = {"device": device.current_device(), "dtype": dtype}
    hidden = torch.randn(case.rows, case.hidden, generator=generator).to(**where).requires_grad_()
    weight = torch.randn(case.columns, case.hidden, generator=generator).to(**where).mul_(case.hidden**-0.5)
    weight.requires_grad_()
    accumulating = weight.detach().requires_grad_()
    # As Megatron's data parallelism prepares a parameter.
    accumulating.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    accumulating.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    targets = torch.randint(0, case.columns, (case.rows,), generator=generator).to(hidden.device)
    incoming = torch.randn(case.rows, generator=generator).to(hidden.device)

    def plain() -> tuple[Tensor, ...]:
        logps = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return torch.autograd.grad(logps, (hidden, weight), incoming)

    def fused() -> tuple[Tensor, ...]:
        return torch.autograd.grad(response_logps(hidden, weight, targets), (hidden, weight), incoming)

    def into_main_grad() -> tuple[Tensor, ...]:
        logps = response_logps(hidden, accumulating, targets)
        return torch.autograd.grad(logps, (hidden, accumulating), incoming)[:1]

    runs = {PLAIN: plain, FUSED: fused, MAIN_GRAD: into_main_grad}
    if device.has_cuda() and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        runs[LIGER] = lambda: torch.autograd.grad(loss(weight, hidden, targets), (hidden, weight))
    return runs


def report(results: Mapping[Case, Mapping[str, Result]], dtype: str) -> str:
    """The table and what it means."""
    return f"""Forward and backward pass in {dtype}, from hidden states to their gradient and the weight's:
log-probabilities of one target per row, with incoming gradients of all sizes. TP is simulated: one rank's part of the
vocabulary, without the collectives. Times are medians (smallest – largest) over rounds in which every candidate ran
once; the ratio is taken round by round. Memory is the peak beyond inputs and gradients, also as a share of rows ×
columns × 4 bytes, the logits in float32 that plain builds; where plain is missing, its three arrays of that size didn't
fit.

{_lines(results)}"""


def _lines(results: Mapping[Case, Mapping[str, Result]]) -> str:
    rows = []
    for case, by_name in results.items():
        for name, result in by_name.items():
            ratio = result.seconds.per(by_name[PLAIN].seconds).text(".2f") if PLAIN in by_name else "–"
            rows.append(
                [
                    name,
                    f"{case.rows:,}",
                    f"{case.columns:,}",
                    case.tp,
                    case.hidden,
                    result.seconds.text(),
                    ratio,
                    f"{result.extra_bytes / MIB:,.0f}",
                    f"{result.extra_bytes / case.logits_bytes:.1%}",
                ]
            )
    header = ["", "rows", "columns", "TP", "hidden", "seconds", "time / plain's", "extra MiB", "of logits"]
    return markdown_table(header, rows)


def plot(results: Mapping[Case, Mapping[str, Result]]) -> Figure:
    """Time and memory over rows, a line for each candidate and part of the vocabulary."""
    names = list(dict.fromkeys(name for by_name in results.values() for name in by_name))
    parts = list(dict.fromkeys((case.columns, case.tp) for case in results))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
        for (number, (columns, tp)), (colour, name) in itertools.product(
            enumerate(parts), zip(COLOURS, names, strict=False)
        ):
            points = [
                (case.rows, by_name[name])
                for case, by_name in results.items()
                if (case.columns, case.tp) == (columns, tp) and name in by_name
            ]
            if not points:
                continue
            style: dict[str, Any] = {
                "color": colour,
                "marker": "o",
                "linestyle": ("-", "--", ":", "-.")[number % 4],
                "label": f"{name}, {columns:,} columns (TP {tp})",
            }
            rows = [count for count, _ in points]
            axes[0].plot(rows, [result.seconds.median for _, result in points], **style)
            axes[1].plot(rows, [max(result.extra_bytes, MIB) / MIB for _, result in points], **style)
        axes[0].set_ylabel("seconds, forward and backward")
        axes[1].set_ylabel("extra memory at the peak, MiB")
        for one in axes:
            one.set_xlabel("rows")
            one.set_xscale("log", base=2)
            one.set_yscale("log")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2)
        figure.tight_layout()
    return figure


def _free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if device.has_cuda() else psutil.virtual_memory().available


if __name__ == "__main__":
    sys.exit(main())
