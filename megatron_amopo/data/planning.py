"""What data, seed and layout mean for a run's micro-batches, worked out before it starts: how many a step needs so that
none exceeds a budget of tokens, and how even the ranks are.

Takes token counts and the order of samples; a pure function of them, so that every rank comes to the same numbers by
itself and a resumed run to those of the run before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_amopo.data.balance import StepPlan, plan_step


@dataclass(frozen=True)
class Schedule:
    """Of how many micro-batches a pipeline can make a step. An interleaved one sends `together` through each of its
    virtual stages in turn, the last time fewer, but not fewer than its `stages`; others take any number.
    """

    together: int = 1
    stages: int = 1

    def takes(self, num_micro_batches: int) -> bool:
        return num_micro_batches >= self.together and not 0 < num_micro_batches % self.together < self.stages


@dataclass(frozen=True)
class GlobalBatches:
    """The global batches of a run.

    `tokens` [N] of each record when packed; `order` gives the record indices and epochs of samples; `num_samples` of
    the whole run, of which the last batch may get fewer than `size`, the records of a global batch.
    """

    tokens: np.ndarray
    order: Callable[[range], tuple[np.ndarray, np.ndarray]]
    num_samples: int
    size: int
    dp_size: int

    def __len__(self) -> int:
        return -(-self.num_samples // self.size)

    def plans(self, micro_batch_size: int, most: int | None = None) -> Iterator[StepPlan]:
        """How each global batch, the first `most` of them, is dealt to micro-batches of so many records on average."""
        num_micro_batches = self.size // (micro_batch_size * self.dp_size)
        for step in range(len(self) if most is None else min(most, len(self))):
            samples = range(step * self.size, min((step + 1) * self.size, self.num_samples))
            indices, _ = self.order(samples)
            yield plan_step(self.tokens[indices], num_micro_batches=num_micro_batches, dp_size=self.dp_size)

    def micro_batch_size_within(self, budget: int, schedule: Schedule) -> int:
        """The most records per micro-batch, on average, with which no micro-batch of the run has more than `budget`
        tokens; one of a single record may.

        It divides a rank's share of the global batch, so that all steps have the same number of micro-batches, and
        leaves a number that the schedule takes. One record per micro-batch always fits: each is dealt one then. It is
        the answer, too, where the schedule takes no number at all.
        """
        share = self.size // self.dp_size
        for micro_batch_size in range(share, 1, -1):
            if share % micro_batch_size or not schedule.takes(share // micro_batch_size):
                continue
            if all(fits(plan, budget) for plan in self.plans(micro_batch_size)):
                return micro_batch_size
        return 1


def fits(plan: StepPlan, budget: int) -> bool:
    """Whether each micro-batch has at most `budget` tokens or a single record."""
    counts = np.array([[len(batch.items) for batch in own] for own in plan.ranks])
    return bool(((plan.tokens <= budget) | (counts == 1)).all())


@dataclass(frozen=True)
class Balance:
    """What dealing leaves over a number of steps: tokens of the fullest rank over the mean of all ranks, its mean and
    its worst over the steps; and the most tokens of a micro-batch.
    """

    steps: int
    mean: float
    worst: float
    longest: int

    @classmethod
    def of(cls, plans: Iterator[StepPlan]) -> "Balance":
        figures = [(plan.imbalance, int(plan.tokens.max())) for plan in plans]
        imbalances = [imbalance for imbalance, _ in figures]
        return cls(len(figures), float(np.mean(imbalances)), max(imbalances), max(longest for _, longest in figures))
