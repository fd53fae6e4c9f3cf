"""From tokenised groups to micro-batches: the order of an epoch, the dealing of a global batch, the packing of groups.

Every rank computes the same plan from (seed, consumed samples) alone and reads only the groups that it needs: nothing
is broadcast, and a resumed run continues where the stopped one was. Within a global batch groups may be permuted freely
(the gradient is the mean over its groups), so they are dealt to data-parallel ranks and micro-batches to even out the
number of tokens.

Shapes: G groups of a micro-batch, D dimensions, 2 sides (chosen, rejected), T packed tokens, N response tokens.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.groups import TokenizedGroup
from megatron_amopo.data.segments import Branch, PackedSegments
from megatron_amopo.objectives.noise import record_noise


@dataclass(frozen=True)
class GroupBatch:
    """One micro-batch: packed tokens, and what the loss needs to know about them."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64; a rejected response takes up its positions right after the prompt
    segments: PackedSegments
    rows: Tensor  # [N] int64: the token whose hidden state predicts each response token
    targets: Tensor  # [N] int64: the response tokens, sequence by sequence
    lengths: Tensor  # [G, D, 2] int64: response tokens of each sequence, N in all
    record_ids: Tensor  # [G] int64
    noise: Tensor  # [G, D, 2] float32, standard normal
    counted: Tensor  # [G] bool: False for a group that only fills an otherwise empty micro-batch
    num_tokens: int  # tokens without padding

    def to(self, device: torch.device) -> "GroupBatch":
        """The batch with its tensors on ``device``."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in values if isinstance(x, Tensor)}
        return replace(self, segments=PackedSegments(self.segments.branches, device), **moved)


def pack(
    groups: Sequence[TokenizedGroup], noise: Tensor, counted: Sequence[bool], *, pad_to_multiple_of: int = 1
) -> GroupBatch:
    """Pack groups into one row of tokens, padded at its end only.

    Args:
        groups: G ≥ 1 groups of the same number of dimensions D.
        noise: ``[G, D, 2]``.
        counted: G flags, see :class:`GroupBatch`.
        pad_to_multiple_of: T becomes a multiple of it, as sequence parallelism requires of TP.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    branches: list[Branch] = []
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    start = 0
    for group in groups:
        for prompt, chosen, rejected in zip(group.prompts, group.chosen, group.rejected, strict=True):
            split, end = start + len(prompt) + len(chosen), start + len(prompt) + len(chosen) + len(rejected)
            prompt_end = start + len(prompt)
            tokens += [prompt, chosen, rejected]
            positions += [np.arange(split - start), np.arange(len(prompt), len(prompt) + len(rejected))]
            branches += [Branch(start, split), Branch(split, end, prefix_start=start, prefix_end=prompt_end)]
            # A response token is predicted by the token before it, the first of either response by the prompt's last.
            rows += [np.arange(prompt_end - 1, split - 1), np.array([prompt_end - 1]), np.arange(split, end - 1)]
            targets += [chosen, rejected]
            start = end
    padding = np.zeros(-start % pad_to_multiple_of, dtype=np.int64)
    lengths = [[[len(c), len(r)] for c, r in zip(g.chosen, g.rejected, strict=True)] for g in groups]
    return GroupBatch(
        input_ids=_tensor([*tokens, padding])[None],
        position_ids=_tensor([*positions, padding])[None],
        segments=PackedSegments(tuple(branches), torch.device("cpu")),
        rows=_tensor(rows),
        targets=_tensor(targets),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        record_ids=torch.tensor([group.record_id for group in groups], dtype=torch.int64),
        noise=noise,
        counted=torch.tensor(counted, dtype=torch.bool),
        num_tokens=start,
    )


def _tensor(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))


def deal(tokens: np.ndarray, num_bins: int) -> list[list[int]]:
    """Deal items with ``tokens [n]`` each to bins so that the bins' sums are even; at least one item a bin while there
    are enough.

    Longest first into the emptiest bin (Graham's LPT rule: the fullest bin stays within 4/3 of the optimum). A pure
    function: ties go to the earlier item and the lower bin, and each bin's items come in their original order.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    # An empty bin goes before a filled one of the same sum, in case items have no tokens.
    emptiest = [(0, False, number) for number in range(num_bins)]
    for item in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        total, _, number = heapq.heappop(emptiest)
        bins[number].append(item)
        heapq.heappush(emptiest, (total + int(tokens[item]), True, number))
    return [sorted(items) for items in bins]


@lru_cache(maxsize=4)
def _shuffled(num_records: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's order; kept, because every global batch asks for it."""
    return np.random.default_rng([seed, epoch]).permutation(num_records)


@dataclass(frozen=True)
class SampleOrder:
    """Which record the n-th sample of a run is: epoch after epoch over all records, reshuffled each time."""

    num_records: int
    seed: int
    shuffle: bool = True

    def __call__(self, samples: range) -> tuple[np.ndarray, np.ndarray]:
        """Record indices and epochs ``[n]`` of consecutive samples; a range may reach over the end of an epoch."""
        positions = np.arange(samples.start, samples.stop)
        epochs, offsets = np.divmod(positions, self.num_records)
        indices = offsets.copy()
        if self.shuffle:
            for epoch in np.unique(epochs):
                order = _shuffled(self.num_records, self.seed, int(epoch))
                indices[epochs == epoch] = order[offsets[epochs == epoch]]
        return indices, epochs


class MicroBatches(Iterator[GroupBatch]):
    """This data-parallel rank's micro-batches of a run, one after the other, without end.

    Samples at and beyond ``num_samples`` don't exist: the batch that reaches over the end is incomplete, and a
    micro-batch left without any group gets one that isn't counted, so that all ranks take the same number of steps.
    With ``cycle`` the samples start over after it, which is how a validation set is read again and again from its
    beginning.

    Args:
        groups: prepared records.
        order: sample → record.
        num_samples: samples of the whole run (or of one pass with ``cycle``); None for no end.
        num_micro_batches: gives the micro-batches per rank of the next global batch, asked once for each.
        micro_batch_size: groups of a micro-batch, on average over the global batch.
        dp_rank, dp_size: data parallelism.
        noise_seed: of the weights' noise; the seed of :func:`record_noise`.
        consumed_samples: where to start.
        pad_to_multiple_of: of a micro-batch's tokens.
    """

    def __init__(
        self,
        groups: PreparedGroups,
        order: SampleOrder,
        *,
        num_samples: int | None,
        num_micro_batches: Callable[[], int],
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        noise_seed: int,
        consumed_samples: int = 0,
        pad_to_multiple_of: int = 1,
        cycle: bool = False,
    ):
        self._groups, self._order, self._num_samples = groups, order, num_samples
        self._num_micro_batches, self._micro_batch_size = num_micro_batches, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._noise_seed, self._consumed, self._cycle = noise_seed, consumed_samples, cycle
        self._pad_to_multiple_of = pad_to_multiple_of
        # A prompt is packed once for its two responses.
        self._tokens = groups.lengths.sum(axis=(1, 2), dtype=np.int64)
        self._dimension_indices = [groups.manifest.dimensions.index(name) for name in groups.dimensions]
        self._pending: list[Callable[[], GroupBatch]] = []

    def __next__(self) -> GroupBatch:
        if not self._pending:
            self._pending = self._next_global_batch()[::-1]
        return self._pending.pop()()

    def _next_global_batch(self) -> list[Callable[[], GroupBatch]]:
        num_bins = self._num_micro_batches() * self._dp_size
        start, stop = self._consumed, self._consumed + num_bins * self._micro_batch_size
        self._consumed = stop
        if self._num_samples is not None:
            if start >= self._num_samples:
                raise StopIteration
            stop = min(stop, self._num_samples)
            if self._cycle and stop == self._num_samples:
                self._consumed = 0
        indices, epochs = self._order(range(start, stop))
        bins = deal(self._tokens[indices], num_bins)
        mine = bins[self._dp_rank :: self._dp_size]
        filler = int(np.argmin(self._tokens[indices]))
        return [self._builder(indices[items or [filler]], epochs[items or [filler]], bool(items)) for items in mine]

    def _builder(self, indices: np.ndarray, epochs: np.ndarray, counted: bool) -> Callable[[], GroupBatch]:
        def build() -> GroupBatch:
            groups = [self._groups[int(i)] for i in indices]
            record_ids = torch.tensor([group.record_id for group in groups], dtype=torch.int64)
            # Drawn for all prepared dimensions, so that training on a subset draws the same noise for those it keeps.
            noise = record_noise(
                self._noise_seed, record_ids, len(self._groups.manifest.dimensions), torch.from_numpy(epochs)
            )
            return pack(
                groups,
                noise[:, self._dimension_indices],
                [counted] * len(groups),
                pad_to_multiple_of=self._pad_to_multiple_of,
            )

        return build
