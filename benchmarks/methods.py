"""What a reference model costs: a training step without one, with its log-probabilities cached, with a second model.

    python -m benchmarks.methods --data preferences.jsonl --tokenizer Qwen2.5-0.5B-Instruct

The same records in the same rounds, under all dimension prompts and under the general one alone: SimPO, which has no
reference; DPO, whose reference log-probabilities were computed before, as this project does it; DPO with a second,
frozen model that each step runs forwards, as is usual elsewhere. The forward pass that fills the cache is timed, too:
it is paid once. Prints a table and writes a folder with it and a plot.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.comparison import TOLERANCES, ResultsDiffer, run_step, with_noise
from benchmarks.models import Models, ModelSlice, OurStep, add_model_arguments, both_models, dtype_of
from benchmarks.records import add_source_arguments, choose_records, source_of, within_vocabulary
from benchmarks.support import (
    COLOURS,
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
from megatron_amopo.data.batching import GroupBatch, pack
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.groups import GENERAL, TokenizedGroup
from megatron_amopo.objectives import choose_objective
from megatron_amopo.objectives.statistics import response_statistics

NONE, CACHED, SECOND = "no reference", "reference cached", "second model"
EPOCHS = 3
PEAKS = 3  # of memory, of which the median is taken


@dataclass(frozen=True)
class Result:
    """A method, measured; bytes are beyond the policy's weights."""

    dimensions: int  # D
    reference: str
    seconds: Samples  # of a step
    pass_seconds: Samples | None  # of filling the cache for the step's records, paid once
    extra_bytes: int  # at the peak, a second model's weights included

    def per_epoch(self, epochs: int) -> Samples:
        """Seconds of the step's records in each of so many epochs, with their part of what is paid once."""
        if self.pass_seconds is None:
            return self.seconds
        pairs = zip(self.seconds.values, self.pass_seconds.values, strict=True)
        return Samples(tuple(step + once / epochs for step, once in pairs))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_source_arguments(parser)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--records", type=int, default=2, help="records of a step, one per micro-batch (default: %(default)s)")
    add("--short", type=int, default=300, help="most tokens of a response (default: %(default)s)")
    add("--output", type=Path, default=RESULTS / "methods", help="folder of the results (default: %(default)s)")
    args = parser.parse_args(arguments)

    model_slice, dtype = ModelSlice.of(args.config, args.parts), dtype_of(args)
    with tempfile.TemporaryDirectory() as temporary, both_models(model_slice, dtype=dtype) as models:
        folder = Path(temporary, "data")
        groups = source_of(args, args.data).prepare(folder, most_response_tokens=args.short)
        chosen, _ = choose_records(groups, args.records)
        results = measure(models, folder, chosen, [groups.dimensions, (GENERAL,)], args.repetitions, dtype)
    text = report(str(model_slice), args.short, args.records, results)
    print(text)
    write_results(
        args.output,
        title="What a reference model costs",
        command=command_of("benchmarks.methods", arguments),
        text=text,
        data={
            "model": model_slice.config,
            "parts": model_slice.parts,
            "dtype": args.dtype,
            "transformer_impl": models.transformer_impl,
            "records": args.records,
            "methods": {name: asdict(result) for name, result in results.items()},
        },
        figures={"methods": plot(results, args.records)},
    )
    return 0


def measure(
    models: Models,
    data: Path,
    chosen: Sequence[int],
    choices: Sequence[tuple[str, ...]],
    repetitions: int,
    dtype: torch.dtype,
) -> dict[str, Result]:
    """Every method by name, under each choice of dimensions.

    Args:
        models: the policy.
        data: folder of prepared data.
        chosen: the records of a step.
        choices: dimensions to train.
        repetitions: timings of each.
        dtype: of the weights.

    Raises:
        ResultsDiffer: the second model's log-probabilities aren't those of transformers.
    """
    second = models.frozen_copy()
    weight_bytes = sum(parameter.nbytes for parameter in second.parameters())
    steps: dict[str, Callable[[], Tensor]] = {}
    fills: dict[str, Callable[[], list[GroupBatch]]] = {}
    kinds: dict[str, tuple[int, str]] = {}
    for dimensions in choices:
        groups = PreparedGroups.open(data, dimensions=dimensions)
        records = [within_vocabulary(groups[index], models.vocab_size) for index in chosen]
        here = device.current_device()
        batches = [pack(part, noise, [True]).to(here) for part, noise in with_noise(records, 1)]
        _check_references(models, records, _with_references(models, second, batches), dtype)
        by_reference = _steps(models, second, batches, dimensions)
        for reference, step in by_reference.items():
            name = method_name(len(dimensions), reference)
            steps[name], kinds[name] = step, (len(dimensions), reference)
        fills[method_name(len(dimensions), CACHED)] = partial(_with_references, models, second, batches)

    extra_bytes = {}
    for name, step in steps.items():
        peaks = []
        for _ in range(1 + PEAKS):
            models.megatron.zero_grad(set_to_none=True)
            peaks.append(peak_extra_memory(step))
        # Without the first, which makes what is kept for good; resident memory is more or less from call to call.
        extra_bytes[name] = statistics.median_low(peaks[1:]) + (weight_bytes if kinds[name][1] == SECOND else 0)
    seconds = time_interleaved({**steps, **{f"fill/{name}": fill for name, fill in fills.items()}}, repetitions)
    return {name: Result(*kinds[name], seconds[name], seconds.get(f"fill/{name}"), extra_bytes[name]) for name in steps}


def _steps(
    models: Models, second: torch.nn.Module, batches: Sequence[GroupBatch], dimensions: tuple[str, ...]
) -> dict[str, Callable[[], Tensor]]:
    """A step of each kind of reference, which leaves its gradient in the policy and gives its loss."""
    simpo, dpo = (
        OurStep(models, dimensions, choose_objective(dimensions, pairwise=pairwise)) for pairwise in ("simpo", "dpo")
    )
    cached = _with_references(models, second, batches)

    def dpo_with_second(batch: GroupBatch) -> Tensor:
        return dpo(*_with_references(models, second, [batch]))

    return {
        NONE: lambda: run_step(models.megatron, [partial(simpo, batch) for batch in batches]),
        CACHED: lambda: run_step(models.megatron, [partial(dpo, batch) for batch in cached]),
        SECOND: lambda: run_step(models.megatron, [partial(dpo_with_second, batch) for batch in batches]),
    }


def method_name(dimensions: int, reference: str) -> str:
    """As a table says it."""
    if dimensions == 1:
        return "SimPO" if reference == NONE else f"DPO, {reference}"
    return "AMoPO" if reference == NONE else f"AMoPO over DPO, {reference}"


def _with_references(models: Models, second: torch.nn.Module, batches: Sequence[GroupBatch]) -> list[GroupBatch]:
    """The batches with Σ log π_ref of each response, by a forward pass of ``second``."""
    from megatron_amopo.model.builder import forward_logps

    result = []
    with torch.no_grad():
        for batch in batches:
            logps = forward_logps(second, batch, vocab_size=models.vocab_size)
            sums = response_statistics(logps, batch.lengths).sum_logps
            result.append(replace(batch, reference_logps=sums))
    return result


def _check_references(
    models: Models, records: Sequence[TokenizedGroup], batches: Sequence[GroupBatch], dtype: torch.dtype
) -> None:
    """Whether the references are what transformers' model computes, whose weights are the second model's, too."""
    with torch.no_grad():
        for record, batch in zip(records, batches, strict=True):
            assert batch.reference_logps is not None
            expected = reference_sums(models.transformers, record)
            error = (batch.reference_logps.cpu() - expected).norm() / expected.norm()
            if not error <= TOLERANCES[dtype]:
                raise ResultsDiffer(f"reference log-probabilities: relative error {error:.1e} against transformers'")


def reference_sums(model: torch.nn.Module, record: TokenizedGroup) -> Tensor:
    """Σ log p ``[1, D, 2]`` of a record's responses by a model of transformers, each row by itself; float32, on the
    CPU.
    """
    here = device.current_device()
    sums = []
    for prompt, *pair in zip(record.prompts, record.chosen, record.rejected, strict=True):
        for response in pair:
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]], device=here)
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            logps = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
            sums.append(logps.sum().cpu())
    return torch.stack(sums).view(1, -1, 2)


def report(model: str, short: int, records: int, results: Mapping[str, Result]) -> str:
    """The table and what it means."""
    rows = []
    for name, result in results.items():
        first = next(r for r in results.values() if (r.dimensions, r.reference) == (result.dimensions, NONE))
        once = "–" if result.pass_seconds is None else f"{result.pass_seconds.median / records:.3f}"
        rows.append(
            [
                name,
                result.dimensions,
                f"{result.seconds.median / records:.3f}",
                f"{result.seconds.median / records / result.dimensions:.3f}",
                result.seconds.per(first.seconds).text(".2f"),
                once,
                result.per_epoch(EPOCHS).per(first.seconds).text(".2f"),
                f"{result.extra_bytes / MIB:,.0f}",
            ]
        )
    table = markdown_table(
        [
            "",
            "D",
            "step, s/record",
            "s/pair",
            "over no reference",
            "once, s/record",
            f"with {EPOCHS} epochs' share of it",
            "peak beyond the policy's weights, MiB",
        ],
        rows,
    )
    return f"""The model is {model}. A step computes {records} record(s) of at most {short} tokens per response, one per
micro-batch, forward pass, loss and backward pass, without the optimizer; the same records in all rows. Ratios are of
times, over the row without a reference and with as many prompts D, taken round by round: median (smallest – largest).
`once` is the forward pass that fills the cache, which a run of several epochs pays once. A second model's weights count
as memory. A record is D pairs. The reference log-probabilities were found equal to transformers' before anything was
timed.

{table}"""


def plot(results: Mapping[str, Result], records: int) -> Figure:
    """Time and memory of each method."""
    names = list(results)
    colours = dict(zip((NONE, CACHED, SECOND), COLOURS[1:], strict=False))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3), sharey=True)
        for position, result in enumerate(results.values()):
            colour, per_epoch = colours[result.reference], result.per_epoch(EPOCHS)
            spread = [[per_epoch.median - min(per_epoch.values)], [max(per_epoch.values) - per_epoch.median]]
            left.barh(
                position,
                per_epoch.median / records,
                xerr=[[value / records for value in side] for side in spread],
                color=colour,
                capsize=3,
            )
            right.barh(position, result.extra_bytes / MIB, color=colour)
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.set_xlabel(f"seconds per record and epoch, of {EPOCHS} epochs")
        right.set_xlabel("peak memory beyond the policy's weights, MiB")
        figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
