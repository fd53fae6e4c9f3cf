"""Log-probabilities of response tokens, straight from hidden states: one autograd function over a sharded vocabulary.

Takes the hidden rows that predict response tokens, this rank's slice of the output weight and the target tokens; gives
one log-probability per row. Logits exist only for one chunk of rows at a time, forward and backward: what is kept for
the backward pass is the input and one log-sum-exp per row. All chunks share one MAX and one SUM all-reduce over the
tensor-parallel group; the backward pass needs no collective over the vocabulary, only the usual sum of the hidden
states' gradient.

Shapes: N rows, H hidden size, V vocabulary rows in the weight over all ranks, padding included; v = V / TP rows here.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amopo.errors import ConfigError

DEFAULT_CHUNK_ROWS = 1024


def response_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> Tensor:
    """log p(target) ``[N]`` under softmax(hidden · weightᵀ), natural logarithm, float32 (float64 for float64 inputs).

    The matrix products run in the dtype of ``hidden`` and ``weight``; maximum, sum and logarithm in float32.

    Args:
        hidden: ``[N, H]``, the same on every rank of ``tp_group``; differentiable. Its gradient comes out complete
            (summed over ``tp_group``) on every rank.
        weight: ``[v, H]``, rows ``rank·v … (rank + 1)·v − 1`` of the output weight; differentiable.
        targets: ``[N]`` integer token ids in [0, vocab_size).
        tp_group: tensor-parallel group over which the vocabulary is split; None or a group of one means that it isn't.
        vocab_size: rows at and above it are padding: they take no part in the softmax and get no gradient. None: no
            padding.
        chunk_rows: rows per chunk; bounds the working memory at chunk_rows · v logits.

    Raises:
        ConfigError: shapes that don't fit, chunk_rows < 1, or a vocab_size beyond the weight's rows.
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
    if chunk_rows < 1:
        raise ConfigError(f"chunk_rows is {chunk_rows}; expected at least 1")
    total_rows = weight.shape[0] * tp_size
    vocab_size = total_rows if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= total_rows:
        raise ConfigError(
            f"vocab_size {vocab_size} is not in 1 … {total_rows}, the rows of the weight over {tp_size} rank(s)"
        )

    first_row = 0 if tp_group is None else tp_group.rank() * weight.shape[0]
    # Padding stands at the end of the vocabulary, so leaving it out is a slice, possibly an empty one.
    valid_rows = min(max(vocab_size - first_row, 0), weight.shape[0])
    return _ResponseLogps.apply(
        hidden, weight, targets, tp_group if tp_size > 1 else None, first_row, valid_rows, chunk_rows
    )


class _ResponseLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tp_group: dist.ProcessGroup | None,
        first_row: int,
        valid_rows: int,
        chunk_rows: int,
    ) -> Tensor:
        stats_dtype = torch.promote_types(hidden.dtype, torch.float32)
        row_max = hidden.new_full(targets.shape, float("-inf"), dtype=stats_dtype)
        sum_exp, target_logit = hidden.new_zeros((2, *targets.shape), dtype=stats_dtype)
        local_targets = targets - first_row
        is_local = (local_targets >= 0) & (local_targets < valid_rows)

        for rows in _chunks(targets.shape[0] if valid_rows else 0, chunk_rows):
            logits = (hidden[rows] @ weight[:valid_rows].t()).to(stats_dtype)
            row_max[rows] = logits.amax(-1)
            index = local_targets[rows].clamp(0, valid_rows - 1)[:, None]
            target_logit[rows] = logits.gather(1, index)[:, 0] * is_local[rows]
            sum_exp[rows] = logits.sub_(row_max[rows, None]).exp_().sum(-1)

        if tp_group is not None:
            local_max = row_max.clone()
            dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=tp_group)
            partial = torch.stack([sum_exp * (local_max - row_max).exp(), target_logit])
            dist.all_reduce(partial, op=dist.ReduceOp.SUM, group=tp_group)
            sum_exp, target_logit = partial

        log_sum_exp = row_max + sum_exp.log()
        ctx.save_for_backward(hidden, weight, local_targets, is_local, log_sum_exp)
        ctx.tp_group, ctx.valid_rows, ctx.chunk_rows = tp_group, valid_rows, chunk_rows
        return target_logit - log_sum_exp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logps,) = grad_outputs
        hidden, weight, local_targets, is_local, log_sum_exp = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        valid_rows = ctx.valid_rows
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # The sum over chunks is kept in float32: adding many chunks up in bfloat16 would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=log_sum_exp.dtype) if needs_weight else None

        for rows in _chunks(hidden.shape[0] if valid_rows else 0, ctx.chunk_rows):
            logits = (hidden[rows] @ weight[:valid_rows].t()).to(log_sum_exp.dtype)
            # d log p(target) / d logits = onehot(target) − softmax
            grad_logits = logits.sub_(log_sum_exp[rows, None]).exp_().neg_()
            index = local_targets[rows].clamp(0, valid_rows - 1)[:, None]
            grad_logits.scatter_add_(1, index, is_local[rows, None].to(grad_logits.dtype))
            grad_logits = grad_logits.mul_(grad_logps[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight[:valid_rows]
            if grad_weight is not None:
                grad_weight[:valid_rows] += grad_logits.t() @ hidden[rows]

        if grad_hidden is not None and ctx.tp_group is not None:
            dist.all_reduce(grad_hidden, group=ctx.tp_group)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    return [slice(start, min(start + chunk_rows, num_rows)) for start in range(0, num_rows, chunk_rows)]
