"""Our training step in bf16 and in FP8, on slices of the 7B, 14B and 32B shapes of Qwen2.5.

    python -m benchmarks.precision --data FILE --tokenizer DIR

One GPU is enough: a slice has four whole layers and as large a part of the vocabulary (``benchmarks/models.py``). For
every shape and precision: records/s, TFLOP/s, share of the card's peak, peak memory, and how far the precision moves
log-probabilities from bf16's; where its time goes, and how far it is from the card's own rate in matrix products. FP8
needs Transformer Engine and a GPU that has the recipe: what the machine hasn't is left out and named. Without a GPU
float32 and bf16 are compared, which shows that the benchmark runs and nothing else.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.comparison import plain_matmul, run_step, with_noise
from benchmarks.flops import packed_flops
from benchmarks.models import QWEN2_5_0_5B, Models, ModelSlice, OurStep, both_models
from benchmarks.profiling import CATEGORIES, TimeShares, time_shares
from benchmarks.records import add_source_arguments, choose_records, source_of, within_vocabulary
from benchmarks.support import (
    COLOURS,
    GIB,
    RESULTS,
    STYLE,
    Samples,
    command_of,
    device_peak_tflops,
    markdown_table,
    peak_extra_memory,
    time_interleaved,
    write_results,
)
from megatron_amopo import device
from megatron_amopo.data.batching import GroupBatch, pack
from megatron_amopo.data.groups import TokenizedGroup
from megatron_amopo.training.fp8 import ALIGNMENT
from megatron_amopo.training.machine import runnable_fp8_recipes

# Sizes as the models' config.json state them.
_LARGE = {"vocab_size": 152_064, "tie_word_embeddings": False}
SHAPES: Mapping[str, ModelSlice] = MappingProxyType(
    {
        name: ModelSlice.part(
            {
                **QWEN2_5_0_5B,
                **_LARGE,
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": key_values,
            },
            parts=layers // 4,
        )
        for name, hidden, intermediate, layers, heads, key_values in (
            ("7B", 3584, 18_944, 28, 28, 4),
            ("14B", 5120, 13_824, 48, 40, 8),
            ("32B", 5120, 27_648, 64, 40, 8),
        )
    }
)

#: Options of Megatron's ``TransformerConfig`` beyond the dtype.
FP8: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "FP8 delayed": {
            "fp8": "hybrid",
            "fp8_recipe": "delayed",
            "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max",
        },
        "FP8 tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
        "FP8 blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    }
)
BF16 = "bf16"
MATMUL = "matmul"
#: Of which every recipe's multiple is a part, so that all compute on the same batches.
PADDED_TO = max(ALIGNMENT.values())


@dataclass(frozen=True)
class Result:
    """One precision on one shape."""

    seconds: Samples
    flops: float
    records: int
    tokens: int  # before padding
    extra_bytes: int
    logp_difference: float  # from bf16, mean of absolute values, nats per token
    shares: TimeShares
    matmul_flops_per_second: Samples  # of a plain bf16 product of a layer's shape, timed in the same rounds

    @property
    def tflops(self) -> float:
        """Of the whole step, 10¹² operations per second."""
        return self.flops / self.seconds.median / 1e12


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all shapes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_source_arguments(parser)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="(default: all)")
    add("--config", type=Path, help="config.json of a Qwen2 model to take instead, whole (for trying)")
    add("--records", type=int, default=4, help="records of a step (default: %(default)s)")
    add("--micro-batch-size", type=int, default=2, help="records of a micro-batch (default: %(default)s)")
    add("--repetitions", type=int, default=7, help="timings of each (default: %(default)s)")
    add(
        "--peak-tflops",
        type=float,
        help="the card's dense bf16 peak, 10¹² operations/s, to state shares of (default: its data sheet's)",
    )
    add("--output", type=Path, default=RESULTS / "precision", help="folder of the results (default: %(default)s)")
    args = parser.parse_args(arguments)

    shapes = {name: SHAPES[name] for name in args.shapes}
    if args.config is not None:
        shapes = {args.config.stem: ModelSlice.of(args.config, 1)}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        groups = source_of(args, args.data).prepare(Path(folder, "data"))
        chosen, _ = choose_records(groups, args.records)
        records = [groups[index] for index in chosen]
        for name, shape in shapes.items():
            results[name] = measure(shape, records, groups.dimensions, args.micro_batch_size, args.repetitions)
    peak = device_peak_tflops(args.peak_tflops, torch.bfloat16)
    text = report(shapes, results, peak)
    print(text)
    write_results(
        args.output,
        title="A training step in bf16 and in FP8",
        command=command_of("benchmarks.precision", arguments),
        text=text,
        data={
            "models": {name: shape.config for name, shape in shapes.items()},
            "peak_tflops": peak,
            "shapes": {
                name: {precision: asdict(result) | {"tflops": result.tflops} for precision, result in found.items()}
                for name, found in results.items()
            },
        },
        figures={"precision": plot(results)},
    )
    return 0


def measure(
    shape: ModelSlice,
    records: Sequence[TokenizedGroup],
    dimensions: tuple[str, ...],
    micro_batch_size: int,
    repetitions: int,
) -> dict[str, Result]:
    """Every precision that this machine has, on the same weights and batches."""
    first = BF16 if device.has_cuda() else "float32"
    with both_models(shape, dtype=torch.float32 if first == "float32" else torch.bfloat16) as models:
        models.transformers.to("meta")  # its weights are in the other model by now
        variants = {first: models.megatron}
        if first != BF16:
            variants[BF16] = models.build_megatron(params_dtype=torch.bfloat16, bf16=True).to(torch.bfloat16)
        variants |= {name: models.build_megatron(**FP8[name]) for name in runnable(models.transformer_impl)}
        for variant in variants.values():
            variant.load_state_dict(models.megatron.state_dict(), strict=False)  # FP8's scales have their own state
        batches = _batches(records, micro_batch_size, models.vocab_size)
        flops = packed_flops(shape, batches).total
        steps = {name: _step(models, model, batches, dimensions) for name, model in variants.items()}
        exact = _logps(models, variants[BF16], batches[0])
        extra_bytes, differences, shares = {}, {}, {}
        for name, step in steps.items():
            step()  # what it keeps for good
            differences[name] = (_logps(models, variants[name], batches[0]) - exact).abs().mean().item()
            variants[name].zero_grad(set_to_none=True)
            extra_bytes[name] = peak_extra_memory(step)
            shares[name] = time_shares(variants[name], step)
            variants[name].zero_grad(set_to_none=True)
        matmul, matmul_flops = plain_matmul(shape.config, batches[0].num_tokens, torch.bfloat16, flops / 4)
        seconds = time_interleaved({**steps, MATMUL: matmul}, repetitions, warmups=2)
    rate = Samples(tuple(matmul_flops / s for s in seconds[MATMUL].values))
    tokens = sum(batch.num_tokens for batch in batches)
    return {
        name: Result(
            seconds[name], flops, len(records), tokens, extra_bytes[name], differences[name], shares[name], rate
        )
        for name in steps
    }


def runnable(transformer_impl: str) -> list[str]:
    """The FP8 precisions that this machine computes. Megatron's own layers would compute in bf16 under FP8's name."""
    if transformer_impl != "transformer_engine":
        return []
    recipes = runnable_fp8_recipes()
    return [name for name, options in FP8.items() if options["fp8_recipe"] in recipes]


def _batches(records: Sequence[TokenizedGroup], micro_batch_size: int, vocab_size: int) -> list[GroupBatch]:
    folded = [within_vocabulary(record, vocab_size) for record in records]
    batches = [
        pack(part, noise, [True] * len(part), pad_to_multiple_of=PADDED_TO)
        for part, noise in with_noise(folded, micro_batch_size)
    ]
    return [batch.to(device.current_device()) for batch in batches]


def _step(
    models: Models, model: torch.nn.Module, batches: Sequence[GroupBatch], dimensions: tuple[str, ...]
) -> Callable[[], Tensor]:
    our_step = OurStep(models, dimensions, model=model)

    def step() -> Tensor:
        # As Megatron's schedules do: FP8 copies of the weights are made for the first micro-batch.
        model.set_is_first_microbatch()  # type: ignore[operator]
        loss = run_step(model, [partial(our_step, batch) for batch in batches])
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss is {loss.item()}")
        return loss

    return step


def _logps(models: Models, model: torch.nn.Module, batch: GroupBatch) -> Tensor:
    from megatron_amopo.model.builder import forward_logps

    model.set_is_first_microbatch()  # type: ignore[operator]
    with torch.no_grad():
        return forward_logps(model, batch, vocab_size=models.vocab_size).float()


def report(
    shapes: Mapping[str, ModelSlice], results: Mapping[str, Mapping[str, Result]], peak_tflops: float | None
) -> str:
    """The table and what it means."""
    rows = []
    for name, found in results.items():
        for precision, result in found.items():
            rows.append(
                [
                    f"{name}, {precision}",
                    f"{result.records / result.seconds.median:.3g}",
                    f"{result.tokens / result.seconds.median:,.0f}",
                    f"{result.tflops:.3g}",
                    *([f"{result.tflops / peak_tflops:.0%}"] if peak_tflops else []),
                    found[BF16].seconds.per(result.seconds).text(".2f"),
                    f"{result.extra_bytes / GIB:.2f}",
                    f"{result.logp_difference:.4f}",
                ]
            )
    header = [
        *("", "records/s", "tokens/s", "TFLOP/s"),
        *(["of the bf16 peak"] if peak_tflops else []),
        *("over bf16", "peak beyond weights, GiB", "moves log p by, nats/token"),
    ]
    times = [
        [
            f"{name}, {precision}",
            *(f"{result.shares.categories[category]:.0%}" for category in CATEGORIES),
            Samples(tuple(rate / 1e12 for rate in result.matmul_flops_per_second.values)).text(),
            f"{result.tflops * 1e12 / result.matmul_flops_per_second.median:.0%}",
        ]
        for name, found in results.items()
        for precision, result in found.items()
    ]
    models = "\n".join(f"- {name}: {shape}" for name, shape in shapes.items())
    measured = {precision for found in results.values() for precision in found}
    missing = [precision for precision in FP8 if precision not in measured]
    left_out = f"\nLeft out, as this machine doesn't compute them: {', '.join(missing)}.\n" if missing else ""
    return f"""A step is forward pass, loss and backward pass of the same records in all precisions, without the
optimizer. TFLOP/s counts the model's operations, with logits computed twice (`benchmarks/flops.py`), over the whole
step's time; an FP8 step's attention, norms and head are in bf16. `over bf16` is of records/s, round by round: median
(smallest – largest). The last column is the mean absolute difference from bf16's log-probabilities.

{models}

{markdown_table(header, rows)}
{left_out}
Where the time goes, and a plain product of a layer's first MLP matrix in bf16 beside it, timed in the same rounds:

{markdown_table(["", *CATEGORIES, "matmul, TFLOP/s", "step, of matmul rate"], times)}"""


def plot(results: Mapping[str, Mapping[str, Result]]) -> Figure:
    """TFLOP/s of every shape and precision."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
        precisions = list(dict.fromkeys(precision for found in results.values() for precision in found))
        width = 0.8 / len(precisions)
        for number, precision in enumerate(precisions):
            places = [place + width * (number - (len(precisions) - 1) / 2) for place in range(len(results))]
            axes.bar(
                places,
                [found[precision].tflops for found in results.values()],
                width,
                label=precision,
                color=COLOURS[number],
            )
        axes.set_xticks(range(len(results)), list(results))
        axes.set_ylabel("TFLOP/s of the whole step")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


if __name__ == "__main__":
    sys.exit(main())
