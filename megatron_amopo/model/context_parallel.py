"""Context parallelism of packed groups: a micro-batch too long for one GPU, split over several.

Each of C ranks holds an equal, contiguous part of the packed tokens. Everything but attention works on each token
alone. For attention the ranks trade: every one gives away most of its heads and gets all tokens of the few that it
keeps (DeepSpeed-Ulysses, arXiv 2309.14509), so that the attention kernels and the table of branches know nothing of it,
and all ranks have the same work whatever the branches look like. Each response token's log-probability is computed
where the hidden state that predicts it lies; the results, one number per token, are then brought together, and every
rank computes the same loss. Its gradient flows back to each rank's own tokens only, so that the sum over ranks, which
Megatron takes over data and context parallelism alike, counts every token once.

Takes whole micro-batches and gives parts of them; takes and gives attention's query, key, value and context.

Shapes: C ranks, T tokens of the micro-batch, t = T / C tokens of a rank; H query heads and K key-value heads of a
token; N response tokens of the micro-batch, n of them predicted on this rank.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amopo.data.batching import GroupBatch


@dataclass(frozen=True)
class BatchPart:
    """What one rank computes of a micro-batch."""

    batch: GroupBatch  # this rank's tokens, and the response tokens predicted on it; what is per group is unchanged
    own: Tensor  # [n] int64: which of the N response tokens those are; n may be 0
    num_response_tokens: int  # N

    def to(self, device: torch.device) -> "BatchPart":
        """The part with its tensors on ``device``."""
        return replace(self, batch=self.batch.to(device), own=self.own.to(device, non_blocking=True))


def split_batch(batch: GroupBatch, *, rank: int, size: int) -> BatchPart:
    """The part of context-parallel rank ``rank`` of ``size``.

    The table of branches stays that of the whole micro-batch, as attention sees all of it. ``batch`` is best on the
    CPU: choosing rows makes a GPU wait.
    """
    num_tokens = batch.input_ids.shape[1]
    assert num_tokens % size == 0, (num_tokens, size)  # batches are padded for it
    start, stop = num_tokens // size * rank, num_tokens // size * (rank + 1)
    own = ((batch.rows >= start) & (batch.rows < stop)).nonzero()[:, 0]
    part = replace(
        batch,
        input_ids=batch.input_ids[:, start:stop],
        position_ids=batch.position_ids[:, start:stop],
        rows=batch.rows[own] - start,
        targets=batch.targets[own],
    )
    return BatchPart(part, own, num_response_tokens=batch.targets.shape[0])


def gather_logps(own_logps: Tensor, part: BatchPart, group: dist.ProcessGroup) -> Tensor:
    """All ranks' log-probabilities ``[N]`` in the micro-batch's order, from each rank's own ``[n]``.

    Differentiable. Every rank is expected to compute the same loss of them, so that it has the whole gradient and the
    way back is a selection: a sum over ranks would count the loss C times.
    """
    if group.size() == 1:
        return own_logps
    return _GatherLogps.apply(own_logps, part.own, part.num_response_tokens, group)


def shard_heads(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """From this rank's tokens of all heads to all tokens of this rank's heads.

    Where ranks don't divide the key-value heads, these are repeated as often as it takes for each rank to hold those
    that its query heads read.

    Args:
        q: ``[t, H, size]``; C divides H.
        k, v: ``[t, K, size]``; K divides H.

    Returns:
        ``[T, H / C, size]``, and twice ``[T, K / gcd(K, C), size]``; views of one buffer, contiguous in their last two
        dimensions.
    """
    # With r = C / gcd(K, C), C divides K·r; and r divides H / K, so that each repeated head serves whole query heads.
    repeats = group.size() // math.gcd(k.shape[1], group.size())
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    return _ShardHeads.apply(q, k, v, group)


def shard_tokens(context: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Back from all tokens of this rank's heads, ``[T, H / C, size]``, to its tokens of all heads, ``[t, H, size]``."""
    return _ShardTokens.apply(context, group)


class _GatherLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_logps: Tensor, own: Tensor, num_response_tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(own)
        # Parts differ in length. Each entry of the sum has one term beside zeros, so it is a gather, to the last bit.
        logps = own_logps.new_zeros(num_response_tokens)
        logps[own] = own_logps
        dist.all_reduce(logps, group=group)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return grad_outputs[0][own], None, None, None


class _ShardHeads(torch.autograd.Function):
    # q, k and v travel together. In three autograd functions their collectives could come in another order on another
    # rank's way back, and the gradients would be exchanged without a word.
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.heads = [x.shape[1] // group.size() for x in (q, k, v)]
        parts = [_by_rank(x, group.size()) for x in (q, k, v)]
        received = _all_to_all(torch.cat(parts, dim=2), group)
        # Ranks hold consecutive tokens: what came from one after the other is in order.
        return received.flatten(0, 1).split(ctx.heads, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        sent = torch.cat(grad_outputs, dim=1).unflatten(0, (ctx.group.size(), -1))
        return *(_to_heads(x) for x in _all_to_all(sent, ctx.group).split(ctx.heads, dim=2)), None


class _ShardTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_heads(_all_to_all(context.unflatten(0, (group.size(), -1)), group))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(_by_rank(grad_outputs[0], ctx.group.size()), ctx.group).flatten(0, 1), None


def _by_rank(x: Tensor, size: int) -> Tensor:
    """``[t, heads, size]`` seen as ``[C, t, heads / C, size]``: what goes to each rank."""
    return x.unflatten(1, (size, -1)).transpose(0, 1)


def _to_heads(x: Tensor) -> Tensor:
    """``[C, t, heads / C, size]``, by the rank it came from, to ``[t, heads, size]``."""
    return x.transpose(0, 1).flatten(1, 2)


def _all_to_all(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[C, …]``: part i goes to rank i; what comes from rank i is part i."""
    sent = sent.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
