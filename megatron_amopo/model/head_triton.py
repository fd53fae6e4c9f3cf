"""What happens to a block of logits in the fused head, as Triton kernels for CUDA: logits are read in the GEMM's type
and worked on in float32 registers, so that the only array of a block's size is the GEMM's output.

The functions are those of ``head_torch.py``, which says what they take; here the arithmetic is always float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Types of logits that the kernels take.
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_BLOCK = 4096  # columns that a program holds at a time
_NUM_WARPS = 8


def add_statistics(logits: Tensor, targets: Tensor, row_max: Tensor, sum_exp: Tensor, target_logit: Tensor) -> None:
    """See :func:`megatron_amopo.model.head_torch.add_statistics`."""
    num_rows, num_columns = logits.shape
    _statistics_kernel[(num_rows,)](
        logits, targets, row_max, sum_exp, target_logit, num_columns, BLOCK=_BLOCK, num_warps=_NUM_WARPS
    )


def write_grad_logits(logits: Tensor, targets: Tensor, log_sum_exp: Tensor, grad_logps: Tensor) -> None:
    """See :func:`megatron_amopo.model.head_torch.write_grad_logits`."""
    num_rows, num_columns = logits.shape
    _grad_logits_kernel[(num_rows, triton.cdiv(num_columns, _BLOCK))](
        logits, targets, log_sum_exp, grad_logps, num_columns, BLOCK=_BLOCK, num_warps=_NUM_WARPS
    )


@triton.jit
def _statistics_kernel(logits, targets, row_max, sum_exp, target_logit, num_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row, one pass over its columns."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_columns
    running_max = tl.load(row_max + row)
    running_sum = tl.load(sum_exp + row)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(running_max, tl.max(values, 0))
        running_sum = running_sum * tl.exp(running_max - new_max) + tl.sum(tl.exp(values - new_max), 0)
        running_max = new_max
    tl.store(row_max + row, running_max)
    tl.store(sum_exp + row, running_sum)
    target = tl.load(targets + row)
    if (target >= 0) & (target < num_columns):
        tl.store(target_logit + row, tl.load(logits + target).to(tl.float32))


@triton.jit
def _grad_logits_kernel(logits, targets, log_sum_exp, grad_logps, num_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row and BLOCK columns; each element is read and written by one thread."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    logits += row * num_columns + columns
    values = tl.load(logits, mask=mask, other=float("-inf")).to(tl.float32)
    probs = tl.exp(values - tl.load(log_sum_exp + row))
    is_target = columns == tl.load(targets + row)
    tl.store(logits, (tl.where(is_target, 1.0, 0.0) - probs) * tl.load(grad_logps + row), mask=mask)
