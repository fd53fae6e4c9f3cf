"""Log-probabilities of response tokens, straight from hidden states: one autograd function over a sharded vocabulary.

Takes the hidden rows that predict response tokens, this rank's slice of the output weight and the target tokens; gives
one log-probability per row. Logits exist only for one block of rows × vocabulary columns at a time, forward and
backward, in a buffer of fixed size: what is kept for the backward pass is the input and one log-sum-exp per row. All
blocks share one MAX and one SUM all-reduce over the tensor-parallel group; the backward pass computes each block of
logits once more and needs no collective over the vocabulary, only the usual sum of the hidden states' gradient.

Blocks are cut in both directions: across the whole vocabulary, the buffer would hold a few hundred rows, and the
weight's gradient, which is read and written once per block of rows, would be a matter of memory traffic.

Shapes: N rows, H hidden size, V vocabulary rows in the weight over all ranks, padding included; v = V / TP rows here.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amopo.errors import ConfigError
from megatron_amopo.model import head_torch
from megatron_amopo.model.accumulate import add_product

DEFAULT_BUFFER_BYTES = 64 * 2**20
# glibc keeps freed arrays of up to 32 MiB; larger ones get new pages from the operating system each time.
_CPU_BUFFER_BYTES = 24 * 2**20

# A GEMM that sums over fewer rows than the first spends its time on reading and writing the weight's gradient; beyond
# the second nothing is gained.
_ENOUGH_ROWS, _MANY_ROWS = 1024, 2048
_FEWEST_COLUMNS = 512
_ALIGNMENT = 64  # of a block's columns: GEMMs are slow on rows that don't start at a multiple of 16 bytes


@dataclass(frozen=True)
class Blocks:
    """The largest block of logits that exists at a time."""

    rows: int
    columns: int

    def of_rows(self, num_rows: int) -> Iterator[slice]:
        """Consecutive slices of ``num_rows`` rows."""
        return _slices(num_rows, self.rows)

    def of_columns(self, num_columns: int) -> Iterator[slice]:
        """Consecutive slices of ``num_columns`` columns."""
        return _slices(num_columns, self.columns)


def plan_blocks(
    num_rows: int,
    num_columns: int,
    hidden_size: int,
    *,
    element_size: int,
    buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    all_rows: bool = False,
) -> Blocks:
    """Blocks whose logits, and the float32 sum of their rows' hidden gradient where it needs one, fit ``buffer_bytes``.

    Args:
        num_rows, num_columns: N and the vocabulary columns of this rank.
        hidden_size: H.
        element_size: bytes of a logit, as the GEMM gives it.
        buffer_bytes: upper bound, unless it is too small for 512 columns or, with ``all_rows``, for the sum.
        all_rows: a block has all rows, so that each entry of the weight's gradient is one GEMM's. The sum takes
            N · H · 4 bytes then, and logits at least a quarter of the buffer.
    """
    num_rows, num_columns = max(num_rows, 1), max(num_columns, 1)
    fitting = buffer_bytes // element_size
    if num_rows * num_columns <= fitting:
        return Blocks(num_rows, num_columns)
    rows, columns = fitting // num_columns, num_columns
    if all_rows or rows < _ENOUGH_ROWS:
        rows = num_rows if all_rows else min(num_rows, _MANY_ROWS)
        sum_bytes = 0 if element_size >= 4 else 4 * rows * hidden_size
        columns = max(buffer_bytes - sum_bytes, buffer_bytes // 4) // (rows * element_size)
    if columns < num_columns:
        columns = _even(num_columns, max(columns // _ALIGNMENT * _ALIGNMENT, _FEWEST_COLUMNS), _ALIGNMENT)
    return Blocks(_even(num_rows, rows), min(columns, num_columns))


def response_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    blocks: Blocks | None = None,
) -> Tensor:
    """log p(target) ``[N]`` under softmax(hidden · weightᵀ), natural logarithm, float32 (float64 for float64 inputs).

    The matrix products run in the dtype of ``hidden`` and ``weight``; maximum, sum and logarithm in float32.

    Args:
        hidden: ``[N, H]``, the same on every rank of ``tp_group``; differentiable. Its gradient comes out complete
            (summed over ``tp_group``) on every rank.
        weight: ``[v, H]``, rows ``rank·v … (rank + 1)·v − 1`` of the output weight; differentiable. Where it carries a
            ``main_grad``, as Megatron's data parallelism gives each parameter, its gradient is added to that in
            ``main_grad``'s precision, and what autograd sees is a placeholder.
        targets: ``[N]`` integer token ids in [0, vocab_size).
        tp_group: tensor-parallel group over which the vocabulary is split; None or a group of one means that it isn't.
        vocab_size: rows at and above it are padding: they take no part in the softmax and get no gradient. None: no
            padding.
        buffer_bytes: working memory for logits, see :func:`plan_blocks`; without ``all_rows``, the CPU takes no more
            than 24 MiB.
        blocks: take these instead.

    Raises:
        ConfigError: shapes that don't fit, no working memory, or a vocab_size beyond the weight's rows.
    """
    tp_size = 1 if tp_group is None else tp_group.size()
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise ConfigError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and targets {list(targets.shape)} don't fit "
            "[N, H], [v, H] and [N]"
        )
    if buffer_bytes < 1:
        raise ConfigError(f"buffer_bytes is {buffer_bytes}; expected at least 1")
    total_rows = weight.shape[0] * tp_size
    vocab_size = total_rows if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= total_rows:
        raise ConfigError(
            f"vocab_size {vocab_size} is not in 1 … {total_rows}, the rows of the weight over {tp_size} rank(s)"
        )

    first_row = 0 if tp_group is None else tp_group.rank() * weight.shape[0]
    # Padding stands at the end of the vocabulary, so leaving it out is a slice, possibly an empty one.
    valid_rows = min(max(vocab_size - first_row, 0), weight.shape[0])
    main_grad = getattr(weight, "main_grad", None) if weight.requires_grad else None
    weight_sum = weight if main_grad is None else main_grad
    # Adding several GEMMs up in low precision would lose the small ones.
    all_rows = weight.requires_grad and weight_sum.element_size() < 4
    blocks = blocks or plan_blocks(
        hidden.shape[0],
        valid_rows,
        hidden.shape[1],
        element_size=hidden.element_size(),
        buffer_bytes=buffer_bytes if hidden.is_cuda or all_rows else min(buffer_bytes, _CPU_BUFFER_BYTES),
        all_rows=all_rows,
    )
    return _ResponseLogps.apply(
        hidden, weight, targets - first_row, tp_group if tp_size > 1 else None, valid_rows, main_grad, blocks
    )


class _ResponseLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        local_targets: Tensor,
        tp_group: dist.ProcessGroup | None,
        valid_rows: int,
        main_grad: Tensor | None,
        blocks: Blocks,
    ) -> Tensor:
        row_max = hidden.new_full(local_targets.shape, float("-inf"), dtype=_statistics_dtype(hidden))
        sum_exp, target_logit = torch.zeros((2, *local_targets.shape), dtype=row_max.dtype, device=hidden.device)

        kernels, logits_of = _kernels(hidden), _LogitsBuffer(hidden, weight, blocks)
        for rows in blocks.of_rows(hidden.shape[0]):
            for columns in blocks.of_columns(valid_rows):
                kernels.add_statistics(
                    logits_of(rows, columns),
                    local_targets[rows] - columns.start,
                    row_max[rows],
                    sum_exp[rows],
                    target_logit[rows],
                )

        if tp_group is not None:
            local_max = row_max.clone()
            dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=tp_group)
            # A target that stands on another rank left zero here.
            partial = torch.stack([sum_exp * (local_max - row_max).exp(), target_logit])
            dist.all_reduce(partial, op=dist.ReduceOp.SUM, group=tp_group)
            sum_exp, target_logit = partial

        log_sum_exp = row_max + sum_exp.log()
        ctx.save_for_backward(hidden, weight, local_targets, log_sum_exp)
        # Not saved for the backward pass: every micro-batch adds to it, which autograd would take for a change of it.
        ctx.main_grad = main_grad
        ctx.tp_group, ctx.valid_rows, ctx.blocks = tp_group, valid_rows, blocks
        return target_logit - log_sum_exp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps = grad_outputs[0].contiguous()
        hidden, weight, local_targets, log_sum_exp = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        valid_rows, blocks = ctx.valid_rows, ctx.blocks
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = ctx.main_grad
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)

        kernels, logits_of = _kernels(hidden), _LogitsBuffer(hidden, weight, blocks)
        for rows in blocks.of_rows(hidden.shape[0]):
            # Over several blocks of columns the sum is kept in float32, or it would lose the small ones.
            in_parts = blocks.columns < valid_rows and hidden.element_size() < 4
            hidden_sum = torch.zeros_like(hidden[rows], dtype=torch.float32) if in_parts and needs_hidden else None
            for columns in blocks.of_columns(valid_rows):
                grad_logits = logits_of(rows, columns)
                kernels.write_grad_logits(
                    grad_logits, local_targets[rows] - columns.start, log_sum_exp[rows], grad_logps[rows]
                )
                if grad_hidden is not None:
                    add_product(grad_hidden[rows] if hidden_sum is None else hidden_sum, grad_logits, weight[columns])
                if needs_weight:
                    add_product(grad_weight[columns], grad_logits.t(), hidden[rows])
            if hidden_sum is not None:
                grad_hidden[rows] = hidden_sum  # type: ignore[index]

        if grad_hidden is not None and ctx.tp_group is not None:
            dist.all_reduce(grad_hidden, group=ctx.tp_group)
        if needs_weight and ctx.main_grad is not None:
            grad_weight = _placeholder(weight, ctx.main_grad)
        return grad_hidden, grad_weight, None, None, None, None, None


class _LogitsBuffer:
    """Logits of one block after the other in the same memory."""

    def __init__(self, hidden: Tensor, weight: Tensor, blocks: Blocks):
        self._hidden, self._weight = hidden, weight
        self._memory = hidden.new_empty(blocks.rows * blocks.columns)

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        hidden, weight = self._hidden[rows], self._weight[columns]
        logits = self._memory[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
        return torch.mm(hidden, weight.t(), out=logits)


def _placeholder(weight: Tensor, main_grad: Tensor) -> Tensor | None:
    """What autograd gets as the gradient of a weight whose gradient is in ``main_grad`` already.

    Megatron's data-parallel hooks ask for a tensor and ignore what it holds, so it is ``main_grad``'s own memory: a
    tensor of its own would be as large as the weight. A weight with another user (tied embeddings) needs none, as
    autograd has that one's gradient, which the hooks add.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # Without hooks that clear it, autograd would add to the last micro-batch's placeholder.
    if getattr(weight, "zero_out_wgrad", False) or weight.grad is not None:
        return None
    if main_grad.nbytes < weight.nbytes or not main_grad.is_contiguous():
        return torch.empty_like(weight)
    return main_grad.view(-1).view(weight.dtype)[: weight.numel()].view_as(weight)


def _kernels(hidden: Tensor) -> ModuleType:
    triton = _triton_kernels() if hidden.is_cuda else None
    return triton if triton is not None and hidden.dtype in triton.DTYPES else head_torch


@functools.cache
def _triton_kernels() -> ModuleType | None:
    try:
        from megatron_amopo.model import head_triton
    except ImportError:
        return None
    return head_triton


def _statistics_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _even(length: int, most: int, multiple: int = 1) -> int:
    """The step, a ``multiple`` and at most ``most`` (which is one), that cuts ``length`` into the fewest parts, about
    equal; ``length`` itself if it fits."""
    parts = -(-length // most)
    return length if parts == 1 else -(-length // (parts * multiple)) * multiple
