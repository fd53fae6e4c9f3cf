"""Dealing the groups of a global batch to data-parallel ranks and micro-batches, so that all have about as many tokens.

The gradient is the mean over the groups of a global batch, however they are dealt, so this decides about speed and
memory alone: the step waits for the rank with the most tokens, and the micro-batch with the most tokens needs the most
memory. Takes token counts, gives item numbers; pure functions of their arguments, so every rank computes the same plan
and nothing is communicated.

Longest-first dealing, then exchanges between the fullest bin and the others. On real lengths this leaves less
unevenness than largest differencing does, and as little as that refined in the same way.
"""

import heapq
from dataclasses import dataclass

import numpy as np

#: Bounds the work on one global batch; what is left after so many exchanges per bin is far below a percent.
_EXCHANGES_PER_BIN = 8


@dataclass(frozen=True)
class MicroBatch:
    """Items of a global batch that are packed together; not `counted` where an item only fills an empty place."""

    items: tuple[int, ...]
    counted: bool


@dataclass(frozen=True)
class StepPlan:
    """A global batch, dealt: each rank's micro-batches, the same number for all, the longest first."""

    ranks: tuple[tuple[MicroBatch, ...], ...]
    tokens: np.ndarray  # [ranks, micro-batches] int64, fillers included

    @property
    def imbalance(self) -> float:
        """Tokens of the fullest rank over the mean of all ranks; 1 is perfect."""
        totals = self.tokens.sum(axis=1)
        return float(totals.max() / totals.mean())


def plan_step(tokens: np.ndarray, *, num_micro_batches: int, dp_size: int) -> StepPlan:
    """Deal the items of a global batch, of `tokens` [n ≥ 1] each, to `num_micro_batches` on each of `dp_size` ranks.

    Ranks are evened out first, then each rank's micro-batches. Every micro-batch gets an item while there are enough;
    else each gets one at most, and the item with the fewest tokens fills those that stay empty, uncounted.
    """
    enough = len(tokens) >= num_micro_batches * dp_size
    filler = int(np.argmin(tokens))
    plans, sums = [], []
    for own in deal(tokens, dp_size, **({"least": num_micro_batches} if enough else {"most": num_micro_batches})):
        bins = deal(tokens[own], num_micro_batches, **({"least": 1} if enough else {"most": 1}))
        batches = [MicroBatch(tuple(own[i] for i in items) or (filler,), counted=bool(items)) for items in bins]
        totals = [int(tokens[list(batch.items)].sum()) for batch in batches]
        # Longest first, so that the micro-batches which ranks work on at the same time are alike.
        order = sorted(range(num_micro_batches), key=lambda number: (-totals[number], number))
        plans.append(tuple(batches[number] for number in order))
        sums.append([totals[number] for number in order])
    return StepPlan(tuple(plans), np.array(sums, dtype=np.int64))


def deal(tokens: np.ndarray, num_bins: int, *, least: int = 0, most: int | None = None) -> list[list[int]]:
    """Deal items of `tokens` [n] each to bins with even sums, of `least` to `most` items each (None: any number).

    Ties go to the earlier item and the lower bin; each bin's items come in their original order.
    """
    num_items = len(tokens)
    most = num_items if most is None else most
    assert least * num_bins <= num_items <= most * num_bins, (least, most, num_bins, num_items)
    counts = [0] * num_bins
    place = np.empty(num_items, dtype=np.int64)
    emptiest = [(0, number) for number in range(num_bins)]
    missing = least * num_bins
    for remaining, item in zip(range(num_items, 0, -1), np.argsort(-tokens, kind="stable").tolist(), strict=True):
        if remaining == missing:  # what is left just fills up the bins that have too few
            emptiest = [entry for entry in emptiest if counts[entry[1]] < least]
            heapq.heapify(emptiest)
        total, number = heapq.heappop(emptiest)
        place[item] = number
        missing -= counts[number] < least
        counts[number] += 1
        if counts[number] < most:
            heapq.heappush(emptiest, (total + int(tokens[item]), number))
    _exchange(tokens, place, num_bins, least=least, most=most)
    return [np.flatnonzero(place == number).tolist() for number in range(num_bins)]


def _exchange(tokens: np.ndarray, place: np.ndarray, num_bins: int, *, least: int, most: int) -> None:
    """Move an item out of the fullest bin, or swap it for a shorter one elsewhere, as long as the fuller of the two
    bins gets emptier by it; then the same with the next fullest. `place` [n], each item's bin, is changed.
    """
    num_items = len(tokens)
    # Moving is swapping for nothing: one item of no tokens in each bin.
    sizes = np.append(tokens, np.zeros(num_bins)).astype(np.int64)
    where = np.append(place, np.arange(num_bins))
    sums = np.bincount(where, weights=sizes).astype(np.int64)
    counts = np.bincount(place, minlength=num_bins)
    settled = np.zeros(num_bins, dtype=bool)
    for _ in range(_EXCHANGES_PER_BIN * num_bins):
        if settled.all():
            break
        fullest = int(np.argmax(np.where(settled, -1, sums)))
        own = np.flatnonzero(where[:num_items] == fullest)
        lighter = sizes[own, None] - sizes  # [own, all]: by how much this swap makes the fullest bin lighter
        gain = np.minimum(lighter, sums[fullest] - sums[where] - lighter)
        gain[:, num_items:][:, (counts >= most) | (counts[fullest] <= least)] = 0
        if gain.max(initial=0) <= 0:
            settled[fullest] = True
            continue
        out, into = np.unravel_index(np.argmax(gain), gain.shape)
        other = where[into]
        sums[fullest] -= lighter[out, into]
        sums[other] += lighter[out, into]
        where[own[out]] = other
        if into < num_items:
            where[into] = fullest
        else:
            counts[fullest] -= 1
            counts[other] += 1
    place[:] = where[:num_items]
