"""Why a layout can't be run: what this project, Megatron or the GPU would refuse, with the reason.

The project's own checks are called as training calls them (``training/checks.py``, ``training/fp8.py``).
Megatron's are assertions in the middle of its validation; they are written here once more, and a test starts Megatron's
own with each case.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from megatron_amopo.checkpoint.families import SequenceLimit
from megatron_amopo.errors import ConfigError
from megatron_amopo.planning.hardware import Gpu
from megatron_amopo.planning.layout import Layout, Options
from megatron_amopo.planning.sizes import ModelSizes
from megatron_amopo.training.checks import LEAST, check_before, check_schedule, check_shape
from megatron_amopo.training.fp8 import check_fp8

PROJECT, MEGATRON, HARDWARE = "megatron-amopo", "Megatron", "hardware"


@dataclass(frozen=True)
class Refusal:
    """One reason, and whose it is."""

    by: str
    reason: str

    def __str__(self) -> str:
        return f"{self.by}: {self.reason}"


def refusals(sizes: ModelSizes, gpu: Gpu, layout: Layout, options: Options, world_size: int) -> tuple[Refusal, ...]:
    """All reasons against a layout on ``world_size`` ranks; empty if it can be run.

    A ``layout`` that doesn't fit ``world_size`` is one of them: then its ``dp`` is what remains of a division.
    """
    return tuple(_refusals(sizes, gpu, layout, options, world_size))


def sequence_refusal(longest: int, limit: SequenceLimit) -> Refusal | None:
    """Of data with sequences of up to ``longest`` tokens."""
    if longest <= limit.tokens:
        return None
    return Refusal(
        PROJECT,
        f"the data has a sequence of {longest:,} tokens; the model takes {limit}. Prepare it with "
        f"--cutoff-len {limit.tokens}",
    )


def _refusals(sizes: ModelSizes, gpu: Gpu, layout: Layout, options: Options, world_size: int) -> Iterator[Refusal]:
    args = _arguments(sizes, layout, options, world_size)
    scheduled = partial(check_schedule, dp=max(layout.dp, 1), has_validation=False)
    for check in (check_before, check_shape, check_fp8, scheduled):
        yield from _of_project(check, args)
    for reason in _of_megatron(sizes, layout, options):
        yield Refusal(MEGATRON, reason)
    if options.is_fp8 and gpu.fp8_flops is None:
        yield Refusal(HARDWARE, f"{gpu.name} has no FP8 matrix units; use --precision bf16")


def _of_project(check: Callable[[Namespace], None], args: Namespace) -> Iterator[Refusal]:
    try:
        check(args)
    except ConfigError as error:
        yield Refusal(PROJECT, str(error))


def _of_megatron(sizes: ModelSizes, layout: Layout, options: Options) -> Iterator[str]:
    layers, counted = sizes.layers, " (embedding and loss counted)" if layout.count_ends else ""
    layers += 2 if layout.count_ends else 0
    if sizes.ffn % layout.tp:
        yield f"--tensor-model-parallel-size {layout.tp} doesn't divide the MLP's width {sizes.ffn}"
    if layers % layout.pp:
        yield f"--pipeline-model-parallel-size {layout.pp} doesn't divide {layers} layers{counted}"
    elif layout.chunks > 1 and (layers // layout.pp) % layout.chunks:
        yield f"{layout.chunks} model chunks don't divide {layers // layout.pp} layers of a pipeline stage{counted}"
    if layout.chunks > 1 and layout.pp == 1:
        yield "interleaved model chunks need --pipeline-model-parallel-size 2 or more"
    if options.precision_aware_optimizer and not options.distributed_optimizer:
        yield "--use-precision-aware-optimizer needs --use-distributed-optimizer"
    if options.optimizer_cpu_offload and not options.precision_aware_optimizer:
        yield "--optimizer-cpu-offload needs --use-precision-aware-optimizer"


def _arguments(sizes: ModelSizes, layout: Layout, options: Options, world_size: int) -> Namespace:
    """What the project's checks read of Megatron's arguments and ours."""
    args = Namespace(**dict.fromkeys(LEAST))  # of most flags, that they aren't given
    vars(args).update(
        amopo_data="data",
        amopo_epochs=1,
        train_iters=None,
        train_samples=None,
        skip_train=False,
        lr=1.0,
        seed=1,
        log_interval=1,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        pipeline_model_parallel_layout=None,
        num_layers_per_virtual_pipeline_stage=None,
        num_virtual_stages_per_pipeline_rank=layout.chunks if layout.chunks > 1 else None,
        microbatch_group_size_per_vp_stage=None,
        micro_batch_size=options.micro_batch,
        global_batch_size=options.global_batch,
        world_size=world_size,
        num_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.kv_heads,
        fp8="hybrid" if options.is_fp8 else None,
        fp8_recipe=options.fp8_recipe,
        first_last_layers_bf16=False,
        transformer_impl="transformer_engine",
        bf16=True,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        kv_channels=sizes.head_size,
    )
    return args
