"""Memory for parts of weights that goes back to the system the moment it is dropped.

The C library keeps freed blocks of these sizes for later and lets small ones settle between them, so a run over
thousands of parts would come to hold several times what it uses. Pages of our own don't stay. Huge ones, where the
system has them, cost a fraction of the time to get.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

_SMALL = 2**20


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous CPU tensor of any numbers."""
    numbers = torch.Size(shape).numel()
    if numbers * dtype.itemsize < _SMALL:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, numbers * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=numbers).reshape(shape)


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another type; itself, where it has the type."""
    return tensor if tensor.dtype == dtype else empty(tensor.shape, dtype).copy_(tensor)
