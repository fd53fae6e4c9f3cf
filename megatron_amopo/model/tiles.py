"""Working through a large tensor a few rows at a time, so that what several operations make of them stays in a CPU's
cache. Operation by operation, each would read and write all of it in main memory, and most of what they make in
between would be memory that the operating system has to hand out first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_CPU_TILE = 2**18  # elements for each thread: a MiB of float32


def row_tiles(matrix: Tensor, *, elsewhere: int | None = None) -> Iterator[slice]:
    """Consecutive slices of the rows of ``matrix [rows, columns]``.

    Args:
        elsewhere: elements of a tile on other devices than the CPU; None takes all rows at once there.
    """
    num_rows, num_columns = matrix.shape
    elements = _CPU_TILE * torch.get_num_threads() if matrix.device.type == "cpu" else elsewhere
    step = max(1, num_rows if elements is None else elements // num_columns)
    return (slice(start, start + step) for start in range(0, num_rows, step))
