"""What a rank keeps in GPU memory, part by part, in bytes. Estimated from shapes; docs/planning.md derives it.

Saved for the backward pass, per token and layer, in elements of bf16 (h hidden, q query channels, kv key and value
channels, f MLP width; tensor parallelism divides q, kv and f, sequence parallelism h):

    norms         2h            their inputs; with norms of queries and keys 2q + kv more: the queries' input is a copy,
                                the keys' a view, which keeps all of linear_qkv's output
    products      2h + q + f    their inputs: of linear_qkv, linear_fc1, linear_proj (attention's output), linear_fc2
    attention     q + kv        rotated queries; keys and values as they are gathered for the branches
    SwiGLU        2f            its input

FP8 keeps the inputs of products in one byte, and attention's output beside linear_proj's input. Recomputing ``mlp``
drops what the MLP keeps and keeps its input; ``full`` keeps a layer's input alone; either needs one layer's whole share
while it is computed again.
"""

from dataclasses import dataclass

from megatron_amopo.planning.hardware import GIB
from megatron_amopo.planning.layout import Layout, Options
from megatron_amopo.planning.parts import Parts
from megatron_amopo.planning.sizes import ModelSizes
from megatron_amopo.planning.work import MicroBatch, StepWork

_BF16, _FP32, _FP8 = 2, 4, 1
_ADAM = 3 * _FP32  # main weight and two moments
# Precision-aware: 16 bits that bf16 weights lack of their main weights, both moments in bf16. With scaling other than
# delayed, Megatron keeps main weights whole.
_ADAM_PRECISION_AWARE = {"bf16": 6, "fp8-delayed": 6, "fp8-tensorwise": 8, "fp8-blockwise": 8}
_HEAD_BUFFER = 64 * 2**20  # --amopo-head-buffer-mib
# Stated, not derived: CUDA's context with the kernels of torch and its libraries, their workspaces, a communicator's
# buffers, and what the allocator can't use of what it holds.
_CONTEXT, _WORKSPACE, _COMMUNICATOR, _FRAGMENTATION = 1.0 * GIB, 0.25 * GIB, 0.25 * GIB, 0.05


@dataclass(frozen=True)
class RankMemory(Parts):
    """Bytes on a rank of one pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    working: float  # temporary tensors of one layer, the longest-lived at a time
    reserve: float


@dataclass(frozen=True)
class SavedBytes(Parts):
    """What one layer keeps of a micro-batch for its backward pass, on a rank."""

    norms: float
    products: float
    attention: float
    swiglu: float


def saved_by_layer(
    sizes: ModelSizes, layout: Layout, batch: MicroBatch, *, is_fp8: bool = False, element: int = _BF16
) -> SavedBytes:
    """Of one layer that recomputes nothing.

    Args:
        element: bytes of an activation.
    """
    tokens, keys = batch.tokens / layout.cp, batch.keys
    hidden, query, ffn = sizes.hidden / layout.splits_sequence, sizes.query / layout.tp, sizes.ffn / layout.tp
    # Under context parallelism attention has all tokens of a part of the heads.
    key_value = sizes.gathered_key_value(layout)
    statistics = _FP32 * (2 / layout.splits_sequence + sizes.heads / layout.tp)  # of norms and softmax
    of_heads = 0.0
    if sizes.qk_norm:
        of_heads = (2 * sizes.query + sizes.key_value) / layout.tp
        statistics += _FP32 * (sizes.heads + sizes.kv_heads) / layout.tp
    of_product = _FP8 if is_fp8 else element
    return SavedBytes(
        norms=(element * (2 * hidden + of_heads) + statistics) * tokens,
        products=of_product * (2 * hidden + query + ffn) * tokens,
        attention=element * (query * (2 if is_fp8 else 1) * tokens + key_value * keys),
        swiglu=element * 2 * ffn * tokens,
    )


def kept_by_layer(
    sizes: ModelSizes, layout: Layout, batch: MicroBatch, *, is_fp8: bool = False, element: int = _BF16
) -> float:
    """Bytes that one layer keeps of a micro-batch under the layout's recomputation."""
    tokens = batch.tokens / layout.cp
    hidden = sizes.hidden / layout.splits_sequence * tokens
    if layout.recompute == "full":
        return element * hidden
    saved = saved_by_layer(sizes, layout, batch, is_fp8=is_fp8, element=element)
    if layout.recompute == "none":
        return saved.total
    of_product = _FP8 if is_fp8 else element
    dropped = saved.swiglu + of_product * (hidden + sizes.ffn / layout.tp * tokens)  # inputs of both products
    return saved.total - dropped + element * hidden


def chunks_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Model chunks whose activations a rank of ``stage`` holds at most, by Megatron's schedules: 1F1B, or interleaved
    with as many micro-batches in a group as there are stages."""
    warm_up = layout.pp - stage - 1
    if layout.chunks > 1:
        warm_up = 2 * warm_up + (layout.chunks - 1) * layout.pp
    return min(warm_up + 1, micro_batches * layout.chunks)


def rank_memory(sizes: ModelSizes, layout: Layout, options: Options, work: StepWork, stage: int) -> RankMemory:
    """Bytes on a rank of ``stage`` (from 0), if every micro-batch in flight is as long as the longest."""
    batch, is_fp8 = padded(work.longest, layout, options), options.is_fp8
    parameters = sizes.stage_parameters(stage, layout)
    layers = sizes.stage_layers(stage, layout)
    products = layers * sizes.layer_linear_weights / layout.tp
    shards = layout.dp * layout.cp if options.distributed_optimizer else 1

    of_layer = kept_by_layer(sizes, layout, batch, is_fp8=is_fp8)
    in_flight = chunks_in_flight(layout, stage, work.micro_batches) * layers / layout.chunks
    tokens = batch.tokens / layout.cp
    hidden = _BF16 * sizes.hidden * tokens
    working = 2 * hidden + _BF16 * 3 * sizes.ffn / layout.tp * tokens
    if layout.recompute != "none":
        working += saved_by_layer(sizes, layout, batch, is_fp8=is_fp8).total
    head = 0.0
    if stage == layout.pp - 1:
        # The final norm's input and output; rows and their gradient, which are never split over tensor parallelism.
        rows = batch.rows / layout.cp
        head = 2 * hidden / layout.splits_sequence + 2 * _BF16 * sizes.hidden * rows + _HEAD_BUFFER

    communicators = 1 + sum(size > 1 for size in (layout.tp, layout.cp, layout.dp, layout.pp))
    used = RankMemory(
        # Transformer Engine keeps FP8 copies of products' weights, as they are and transposed, between micro-batches.
        weights=_BF16 * parameters + (2 * _FP8 * products if is_fp8 else 0),
        gradients=(_BF16 if options.bf16_gradients else _FP32) * parameters,
        optimizer=_optimizer_bytes(options) * parameters / shards,
        activations=in_flight * of_layer,
        head=head,
        working=working,
        reserve=_CONTEXT + _WORKSPACE + communicators * _COMMUNICATOR,
    )
    return RankMemory(**{**used.parts(), "reserve": used.reserve + _FRAGMENTATION * (used.total - used.reserve)})


def host_bytes(sizes: ModelSizes, layout: Layout, options: Options) -> float:
    """Bytes of the host's memory that a rank's offloaded optimizer takes: main weights, moments, gradients."""
    if not options.optimizer_cpu_offload:
        return 0.0
    parameters = max(sizes.stage_parameters(stage, layout) for stage in layout.stages)
    return (_ADAM + _FP32) * parameters / (layout.dp * layout.cp)


def padded(batch: MicroBatch, layout: Layout, options: Options) -> MicroBatch:
    """The micro-batch with the padding that the layout and FP8 need; padding has no pairs and no rows."""
    multiple = layout.cp * (layout.tp if layout.sequence_parallel else 1) * options.token_multiple
    return MicroBatch(-(-batch.tokens // multiple) * multiple, batch.pairs, batch.keys, batch.rows)


def _optimizer_bytes(options: Options) -> int:
    if options.optimizer_cpu_offload:
        return 0
    return _ADAM_PRECISION_AWARE[options.precision] if options.precision_aware_optimizer else _ADAM
