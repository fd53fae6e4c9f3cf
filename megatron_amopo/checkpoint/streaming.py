"""Moving weights part by part: how large a part is, several at a time in threads, and what people see of it.

Threads pay here: reading, writing, copying and converting happen in calls that let the other threads run. A part has at
most PART_NUMBERS numbers, so a worker holds a few hundred megabytes, whatever the size of the model.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import torch
from tqdm import tqdm

from megatron_amopo.errors import ConfigError

#: Numbers in a part: 32 MiB of bfloat16. Larger ones aren't faster; smaller ones cost Megatron's loader time.
PART_NUMBERS = 16 * 2**20
DEFAULT_WORKERS = 2
_SECONDS_BETWEEN_LINES = 60.0
_NAMES_SHOWN = 10


def in_threads[Item, Result](function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """`function` of every item, `workers` at a time; the results in order.

    The first error is raised as soon as the items before it are done; items that haven't begun are then left out.

    Raises:
        ConfigError: `workers` isn't positive.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1")
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


class Progress:
    """How far a run is, in bytes: a bar on a terminal, a line a minute elsewhere. A context manager; takes updates from
    any thread.

    Args:
        what: what happens, for the lines.
        total: bytes.
        shown: False shows nothing.
    """

    def __init__(self, what: str, total: int, *, shown: bool) -> None:
        self._what, self._shown = what, shown
        self._bar = tqdm(
            desc=what, total=total, unit="B", unit_scale=True, dynamic_ncols=True, disable=None if shown else True
        )
        self._done = 0
        self._total = total
        self._lock = threading.Lock()
        self._start = self._last_line = time.monotonic()

    def update(self, nbytes: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self._done += nbytes
            self._bar.update(nbytes)
            now = time.monotonic()
            if self._shown and self._bar.disable and now - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = now
                elapsed = now - self._start
                print(
                    tqdm.format_meter(
                        self._done, self._total, elapsed, ncols=0, prefix=self._what, unit="B", unit_scale=True
                    ),
                    file=sys.stderr,
                    flush=True,
                )

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


class NonFiniteNumbers:
    """Collects the names of tensors with NaN or infinite numbers, from any thread."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def look(self, name: str, tensor: torch.Tensor) -> None:
        """Both extremes are NaN where a number is; finding them takes a tenth of the time of looking at each number."""
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()):
            self._names[name] = None

    def warnings(self) -> tuple[str, ...]:
        """A sentence for people, or none."""
        if not self._names:
            return ()
        names = sorted(self._names)
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        return (f"NaN or infinite numbers in {', '.join(names[:_NAMES_SHOWN])}{more}",)
