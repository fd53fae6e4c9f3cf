"""Adding a matrix product to a float32 sum without rounding the product to the type of its factors.

A gradient that is a sum of several products must be no less exact than the one product that it stands for. A product of
bfloat16 matrices comes out in bfloat16 unless the library is asked otherwise, in ways that differ between devices.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_CPU_ROWS, _CPU_SUMMED = 2048, 512  # what is widened to float32 at a time


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left · right, summed in the precision of ``total``.

    Args:
        total: ``[m, n]``; of the factors' dtype, or float32.
        left: ``[m, k]``.
        right: ``[k, n]``, of the same dtype.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        with _bfloat16_units() if left.dtype == torch.bfloat16 else contextlib.nullcontext():
            for right_part, left_columns in zip(right.split(_CPU_SUMMED), left.split(_CPU_SUMMED, 1), strict=True):
                wide_right = right_part.to(total.dtype)
                for total_part, left_part in zip(total.split(_CPU_ROWS), left_columns.split(_CPU_ROWS), strict=True):
                    total_part.addmm_(left_part.to(total.dtype), wide_right)


@contextlib.contextmanager
def _bfloat16_units() -> Iterator[None]:
    """Let the CPU's products of float32 matrices round their factors to bfloat16, which matrix units are made for. Of
    factors that were bfloat16 before they were widened, this changes nothing but the speed."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
