"""What happens to a block of logits in the fused head, in plain torch: on any device, and the reference of the Triton
kernels (``head_triton.py``), which have the same two functions.

Low-precision logits are widened a tile at a time, so that no float32 copy of a block exists; a tile fits a CPU's cache.

Shapes: a block has r rows and c columns, columns c₀ … c₀ + c − 1 of this rank's vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_amopo.model.tiles import row_tiles

_TILE = 2**23  # elements, beside the CPU


def add_statistics(logits: Tensor, targets: Tensor, row_max: Tensor, sum_exp: Tensor, target_logit: Tensor) -> None:
    """Take a block's columns into the running softmax statistics of its rows (online normaliser, arXiv 1805.02867).

    Args:
        logits: ``[r, c]``, contiguous; its content is lost.
        targets: ``[r]`` target's column within the block; one outside 0 … c − 1 stands in another block.
        row_max, sum_exp: ``[r]`` maximum m and Σ exp(logit − m) of the columns so far (−∞ and 0 at first), updated;
            their dtype is that of the arithmetic.
        target_logit: ``[r]``, set where the target stands in this block.
    """
    for rows, tile in _wide_tiles(logits, row_max.dtype):
        index, is_here = _within(targets[rows], logits.shape[1])
        target_logit[rows] = torch.where(is_here, tile.gather(1, index)[:, 0], target_logit[rows])
        new_max = torch.maximum(row_max[rows], tile.amax(-1))
        sum_exp[rows] *= (row_max[rows] - new_max).exp_()
        sum_exp[rows] += tile.sub_(new_max[:, None]).exp_().sum(-1)
        row_max[rows] = new_max


def write_grad_logits(logits: Tensor, targets: Tensor, log_sum_exp: Tensor, grad_logps: Tensor) -> None:
    """Replace a block of logits by their gradient, (onehot(target) − softmax) · grad_logps.

    Args:
        logits: ``[r, c]``, contiguous; holds the gradient afterwards, in its own dtype.
        targets: as in :func:`add_statistics`.
        log_sum_exp: ``[r]`` over the whole vocabulary; its dtype is that of the arithmetic.
        grad_logps: ``[r]`` gradient of the rows' log-probabilities.
    """
    for rows, tile in _wide_tiles(logits, log_sum_exp.dtype):
        index, is_here = _within(targets[rows], logits.shape[1])
        tile.sub_(log_sum_exp[rows, None]).exp_()
        tile.scatter_add_(1, index, -is_here[:, None].to(tile.dtype))
        tile.mul_(-grad_logps[rows, None])
        if tile.dtype != logits.dtype:
            logits[rows] = tile


def _wide_tiles(logits: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``logits`` and their content in ``dtype``: a view if they have that already, else a copy in memory that
    the next tile takes over."""
    memory = None
    for rows in row_tiles(logits, elsewhere=_TILE):
        tile = logits[rows]
        if logits.dtype != dtype:
            memory = torch.empty_like(tile, dtype=dtype) if memory is None else memory
            tile = memory[: tile.shape[0]].copy_(tile)
        yield rows, tile


def _within(targets: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """An index ``[r, 1]`` that may be used for every row, and whether it is the row's target."""
    index = targets.clamp(0, num_columns - 1)
    return index[:, None], index == targets
