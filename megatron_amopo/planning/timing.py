"""How long a step takes, estimated part by part. Nothing here is measured; docs/planning.md derives the formulas.

A pipeline rank works on its micro-batches one after the other; the slowest stage sets the pace, and filling and
draining the pipeline comes on top. Within a micro-batch:

    matrix products   2·m·n·k / (peak · efficiency · W / (W + ½)), W waves of tiles; forward, and twice backward
    attention         4 · heads · head size · pairs forward and 2.5 times that backward, on bf16's peak
    memory            bytes of norms, residuals, rotary embedding, SwiGLU, FP8 casts and gradient sums / bandwidth
    head              4 matrix products of response rows × vocabulary (logits are computed twice), and their bytes
    communication     bytes of a ring / bandwidth of the links it runs over

Communication that Megatron runs beside computation costs the share ``exposed`` of its time.
"""

from dataclasses import dataclass

from megatron_amopo.planning.efficiency import DEFAULT, Efficiency
from megatron_amopo.planning.hardware import Gpu
from megatron_amopo.planning.layout import THIS_PROJECT, Layout, Options, Software
from megatron_amopo.planning.memory import padded
from megatron_amopo.planning.parts import Parts
from megatron_amopo.planning.sizes import Linear, ModelSizes
from megatron_amopo.planning.work import MicroBatch, StepWork

_BF16, _FP32 = 2, 4
# Elements that a layer's streaming kernels read and write per token, in units of a width: fused norm (x, y), residual
# (two reads, one write), twice each; backward a norm reads its input and a gradient, a residual adds two gradients.
_HIDDEN_FORWARD, _HIDDEN_BACKWARD = 10, 12
_ROTARY = 2  # queries and keys, read and written
_HEAD_NORM_FORWARD, _HEAD_NORM_BACKWARD = 2, 3  # where queries and keys have norms
_SWIGLU_FORWARD, _SWIGLU_BACKWARD = 3, 5
#: Bytes per element of a tensor that is cast to FP8: what is read (twice where the scale must be known first) and the
#: two copies, as they are and transposed, that are written.
_CAST_BYTES = {"bf16": 0, "fp8-delayed": 4, "fp8-tensorwise": 6, "fp8-blockwise": 4}
# Bytes per logit beside the matrix products: the fused head writes and reads a block in the forward pass, and again,
# with its gradient, in the backward pass; stored logits pass through a cross-entropy in float32.
_FUSED_LOGIT_BYTES, _STORED_LOGIT_BYTES = 10, 20
# Per parameter: Adam reads gradient, weight and two moments and writes the last three and the bf16 weight.
_ADAM_BYTES, _ADAM_BYTES_PRECISION_AWARE = 30, 20


@dataclass(frozen=True)
class StepTime(Parts):
    """Seconds of a step on a rank of the slowest stage, by what they go to."""

    matmul: float = 0.0  # the layers' matrix products
    attention: float = 0.0
    memory: float = 0.0  # elementwise kernels, casts, sums of gradients
    head: float = 0.0
    recompute: float = 0.0
    tensor_parallel: float = 0.0  # communication that isn't hidden, as the next three
    context_parallel: float = 0.0
    pipeline_transfers: float = 0.0
    data_parallel: float = 0.0
    bubble: float = 0.0
    imbalance: float = 0.0  # waiting for the data-parallel rank with the most tokens
    optimizer: float = 0.0
    host: float = 0.0  # launches that computation doesn't cover, and what is done once a step


@dataclass(frozen=True)
class _Stage(Parts):
    """Seconds of one micro-batch on a rank of one pipeline stage."""

    matmul: float
    attention: float
    memory: float
    head: float
    recompute: float
    tensor_parallel: float
    context_parallel: float
    transfers: float
    host: float


class TimeModel:
    """The estimate for one model, GPU, layout and way of training."""

    def __init__(
        self,
        sizes: ModelSizes,
        gpu: Gpu,
        layout: Layout,
        options: Options,
        *,
        software: Software = THIS_PROJECT,
        efficiency: Efficiency = DEFAULT,
    ):
        self.sizes, self.gpu, self.layout, self.options = sizes, gpu, layout, options
        self.software, self.efficiency = software, efficiency

    def step(self, work: StepWork) -> StepTime:
        """Seconds of a whole step."""
        layout, count = self.layout, work.micro_batches
        batch = padded(work.mean, layout, self.options)
        stages = [self._stage(batch, stage) for stage in layout.stages]
        slowest = max(stages, key=lambda stage: stage.total)
        mean = sum(stage.total for stage in stages) / layout.pp
        return StepTime(
            matmul=count * slowest.matmul,
            attention=count * slowest.attention,
            memory=count * slowest.memory,
            head=count * slowest.head,
            recompute=count * slowest.recompute,
            tensor_parallel=count * slowest.tensor_parallel,
            context_parallel=count * slowest.context_parallel,
            pipeline_transfers=count * slowest.transfers,
            data_parallel=self._data_parallel(count, slowest.total),
            bubble=(layout.pp - 1) / layout.chunks * mean,
            imbalance=(work.imbalance - 1) * count * slowest.total,
            optimizer=self._optimizer() if self.software.trains_weights else 0.0,
            host=count * slowest.host + self.efficiency.step_seconds,
        )

    # One micro-batch

    def _stage(self, batch: MicroBatch, stage: int) -> _Stage:
        layout, layers = self.layout, self.sizes.stage_layers(stage, self.layout)
        tokens = batch.tokens / layout.cp
        forward, backward = self._matmul_seconds(tokens)
        attention_forward, attention_backward = (self._attention(batch, backward=b) for b in (False, True))
        memory_forward, memory_backward = self._memory(tokens)
        tp_forward, tp_backward = self._tensor_parallel(tokens)
        again = 0.0
        if layout.recompute == "full":
            again = forward + attention_forward + memory_forward + tp_forward
        elif layout.recompute == "mlp":
            again = self._mlp_again(tokens, tp_forward)
        computing = forward + backward + attention_forward + attention_backward + memory_forward + memory_backward
        head = self._head(batch) if stage == layout.pp - 1 else 0.0
        return _Stage(
            matmul=layers * (forward + backward),
            attention=layers * (attention_forward + attention_backward),
            memory=layers * (memory_forward + memory_backward),
            head=head,
            recompute=layers * again,
            tensor_parallel=layers * (tp_forward + tp_backward),
            context_parallel=layers * self._context_parallel(tokens),
            transfers=self._transfers(tokens),
            host=layers * max(0.0, self.efficiency.host_seconds_per_layer - computing - again),
        )

    def _product(self, m: float, n: float, k: float, *, fp8: bool) -> float:
        """Seconds of a matrix product ``m × n``, summed over ``k``."""
        constants, gpu = self.efficiency, self.gpu
        if fp8:
            assert gpu.fp8_flops is not None, "refused before"
            rate = gpu.fp8_flops * constants.gemm_fp8
        else:
            rate = gpu.bf16_flops * constants.gemm_bf16
        waves = m * n / (constants.tile * gpu.multiprocessors)
        return 2 * m * n * k / rate * (waves + constants.lost_waves) / waves

    def _linear(self, linear: Linear, tokens: float) -> tuple[float, float]:
        """Seconds of a layer's product, forward and backward."""
        outputs, inputs = linear.on_rank(self.layout.tp)
        fp8 = self.options.is_fp8
        forward = self._product(tokens, outputs, inputs, fp8=fp8)
        of_input = self._product(tokens, inputs, outputs, fp8=fp8)
        of_weight = self._product(outputs, inputs, tokens, fp8=fp8) if self.software.trains_weights else 0.0
        return forward, of_input + of_weight

    def _matmul_seconds(self, tokens: float) -> tuple[float, float]:
        pairs = [self._linear(linear, tokens) for linear in self.sizes.linears]
        return sum(forward for forward, _ in pairs), sum(backward for _, backward in pairs)

    def _attention(self, batch: MicroBatch, *, backward: bool) -> float:
        channels = self.sizes.query / self.layout.tp / self.layout.cp
        operations = 4 * channels * batch.pairs * (2.5 if backward else 1)
        share = self.efficiency.attention(self.options.attention, batch.keys_per_query, backward=backward)
        return operations / (self.gpu.bf16_flops * share)

    def _memory(self, tokens: float) -> tuple[float, float]:
        """Seconds of what streams through memory in one layer, forward and backward."""
        sizes, layout = self.sizes, self.layout
        hidden, ffn = sizes.hidden / layout.splits_sequence, sizes.ffn / layout.tp
        attention_width = (sizes.query + sizes.key_value / 2) / layout.tp
        of_heads = (_ROTARY + _HEAD_NORM_FORWARD * sizes.qk_norm, _ROTARY + _HEAD_NORM_BACKWARD * sizes.qk_norm)
        forward = _BF16 * (_HIDDEN_FORWARD * hidden + of_heads[0] * attention_width + _SWIGLU_FORWARD * ffn)
        backward = _BF16 * (_HIDDEN_BACKWARD * hidden + of_heads[1] * attention_width + _SWIGLU_BACKWARD * ffn)
        # Inputs of the four products are cast in the forward pass, gradients of their outputs in the backward pass.
        cast = _CAST_BYTES[self.options.precision]
        forward += cast * (2 * hidden + sizes.query / layout.tp + ffn)
        backward += cast * ((sizes.query + sizes.key_value) / layout.tp + 2 * hidden + 2 * ffn)
        sums = 0.0
        if self.software.trains_weights:  # the sum over micro-batches is read and written
            sums = 2 * self._gradient_bytes * sizes.layer_linear_weights / layout.tp
        bandwidth = self.gpu.memory_bandwidth * self.efficiency.memory
        return forward * tokens / bandwidth, (backward * tokens + sums) / bandwidth

    def _head(self, batch: MicroBatch) -> float:
        """Seconds of the output layer and the loss, on the last stage; always in bf16."""
        sizes, layout = self.sizes, self.layout
        rows = batch.rows / layout.cp
        columns = sizes.padded_vocabulary(layout.tp) // layout.tp
        logits = self._product(rows, columns, sizes.hidden, fp8=False)
        of_hidden = self._product(rows, sizes.hidden, columns, fp8=False)
        of_weight = self._product(columns, sizes.hidden, rows, fp8=False) if self.software.trains_weights else 0.0
        times, per_logit = (1, _STORED_LOGIT_BYTES) if self.software.stores_logits else (2, _FUSED_LOGIT_BYTES)
        streamed = per_logit * rows * columns / (self.gpu.memory_bandwidth * self.efficiency.memory)
        return times * logits + of_hidden + of_weight + streamed

    def _mlp_again(self, tokens: float, tp_forward: float) -> float:
        """Recomputing a layer's MLP: its products and SwiGLU, and half of the layer's forward communication."""
        products = sum(self._linear(linear, tokens)[0] for linear in self.sizes.mlp_linears)
        ffn = self.sizes.ffn / self.layout.tp
        streamed = tokens * ffn * (_BF16 * _SWIGLU_FORWARD + _CAST_BYTES[self.options.precision])
        return products + streamed / (self.gpu.memory_bandwidth * self.efficiency.memory) + tp_forward / 2

    # Communication

    def _bandwidth(self, inner: int, size: int) -> float:
        """Bytes/s per rank of a ring over ``size`` ranks that lie ``inner`` apart. Within a node it runs over NVLink;
        beyond, a node's members of the group share their network adapters."""
        nvlink = self.gpu.nvlink_bandwidth * self.efficiency.nvlink
        if inner * size <= self.gpu.per_node:
            return nvlink
        members = max(1, min(size, self.gpu.per_node // inner))
        return min(nvlink, members * self.gpu.network_bandwidth * self.efficiency.network)

    def _tensor_parallel(self, tokens: float) -> tuple[float, float]:
        """Exposed seconds of one layer. Each pass gathers and scatters around both halves of the layer. In the backward
        pass Megatron runs the second gathering of the inputs and the scattering of their gradients beside matrix
        products; the rest only ``Software.tp_overlap`` hides."""
        tp = self.layout.tp
        if tp == 1:
            return 0.0, 0.0
        elements = tokens * self.sizes.hidden * (tp - 1) / tp
        bandwidth = self._bandwidth(1, tp)
        # Transformer Engine gathers what FP8 products take in FP8.
        latency = self.efficiency.collective_seconds
        gather = (1 if self.options.is_fp8 else _BF16) * elements / bandwidth + latency
        scatter = _BF16 * elements / bandwidth + latency
        exposed = self.efficiency.exposed
        alone = exposed if self.software.tp_overlap else 1.0
        forward = 2 * (gather + scatter) * alone
        if (
            not self.layout.sequence_parallel
        ):  # two all-reduces each way, the backward ones beside the weights' products
            return 4 * scatter, 4 * scatter * exposed
        again = gather if self.software.trains_weights else 0.0
        return forward, 2 * gather * alone + 2 * (again + scatter) * exposed

    def _context_parallel(self, tokens: float) -> float:
        """Exposed seconds of one layer, forward and backward."""
        layout, sizes = self.layout, self.sizes
        if layout.cp == 1:
            return 0.0
        bandwidth = self._bandwidth(layout.tp, layout.cp)
        latency = self.efficiency.collective_seconds
        if self.software.ring_context:  # keys and values go around; backward, their gradients too
            key_value = _BF16 * tokens * sizes.key_value / layout.tp
            return 3 * (layout.cp - 1) * (key_value / bandwidth + latency) * self.efficiency.exposed
        query = _BF16 * tokens * sizes.query / layout.tp
        key_value = _BF16 * tokens * sizes.gathered_key_value(layout) * layout.cp
        # There and back, forward and backward.
        return 2 * (2 * query + key_value) * (layout.cp - 1) / layout.cp / bandwidth + 4 * latency

    def _transfers(self, tokens: float) -> float:
        """Exposed seconds of handing hidden states and their gradients on to the next stage."""
        layout = self.layout
        if layout.pp == 1:
            return 0.0
        size = _BF16 * tokens * self.sizes.hidden / layout.splits_sequence
        inside = layout.gpus <= self.gpu.per_node
        # The slowest pair sets the pace: one adapter, where any stage lies on another node than the next.
        bandwidth = (
            self.gpu.nvlink_bandwidth * self.efficiency.nvlink
            if inside
            else self.gpu.network_bandwidth * self.efficiency.network
        )
        hidden = self.efficiency.exposed if layout.chunks > 1 else 1.0  # Megatron overlaps it where stages interleave
        return 2 * layout.chunks * (size / bandwidth + self.efficiency.collective_seconds) * hidden

    @property
    def _gradient_bytes(self) -> int:
        return _BF16 if self.options.bf16_gradients else _FP32

    def _largest_stage(self) -> int:
        return max(self.sizes.stage_parameters(stage, self.layout) for stage in self.layout.stages)

    def _data_parallel(self, micro_batches: int, micro_batch_seconds: float) -> float:
        """Exposed seconds of a step: gradients are scattered (or reduced), weights gathered."""
        layout = self.layout
        ranks = layout.dp * layout.cp
        if ranks == 1 or not self.software.trains_weights:
            return 0.0
        elements = self._largest_stage() * (ranks - 1) / ranks
        seconds = elements * (self._gradient_bytes + _BF16) / self._bandwidth(layout.tp, ranks)
        if not self.options.distributed_optimizer:  # an all-reduce
            seconds = elements * 2 * self._gradient_bytes / self._bandwidth(layout.tp, ranks)
        if self.software.fsdp:  # weights for both passes, and gradients, in every micro-batch
            seconds = elements * (2 * _BF16 + self._gradient_bytes) / self._bandwidth(layout.tp, ranks)
            return micro_batches * self._overlapped(seconds, micro_batch_seconds)
        # Beside the last backward pass and the first forward pass.
        return self._overlapped(seconds, micro_batch_seconds)

    def _overlapped(self, seconds: float, beside: float) -> float:
        """What communication costs that runs beside computation of ``beside`` seconds."""
        exposed = self.efficiency.exposed
        return exposed * seconds + max(0.0, (1 - exposed) * seconds - beside)

    # Once a step

    def _optimizer(self) -> float:
        layout, options, constants = self.layout, self.options, self.efficiency
        shards = layout.dp * layout.cp if options.distributed_optimizer or self.software.fsdp else 1
        parameters = self._largest_stage() / shards
        if options.optimizer_cpu_offload:  # gradients down, weights up, the arithmetic on the CPU
            moved = (_FP32 + _BF16) * parameters / (self.gpu.host_link_bandwidth * constants.network)
            return moved + _ADAM_BYTES * parameters / (self.gpu.host_memory_bandwidth * constants.host_memory)
        per_parameter = _ADAM_BYTES_PRECISION_AWARE if options.precision_aware_optimizer else _ADAM_BYTES
        return per_parameter * parameters / (self.gpu.memory_bandwidth * constants.memory)
