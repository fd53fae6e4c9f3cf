"""Steps whose result must not reach the weights: a loss or gradient that isn't finite, or is far out of the ordinary.

Takes every training step's losses per record and the gradient's norm, after the backward pass and before the
optimizer; gives the verdict, the same on all ranks, and the records behind it. A bad step ends the run or is left out:
the weights, the optimizer's state and the learning rate's schedule stay as they were, and the next step reads the next
records. What is ordinary is the median of the steps before, which checkpoints keep.
"""

import math
import statistics
from argparse import Namespace
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

from megatron_amopo import device
from megatron_amopo.data.batching import GroupBatch
from megatron_amopo.errors import AmopoError
from megatron_amopo.objectives import AmopoLoss, Pairs
from megatron_amopo.training.survival_arguments import BadStepConfig
from megatron_amopo.training.together import gathered

#: Steps that a median is taken of, and the fewest that make one.
WINDOW, LEAST = 128, 16
#: Bad steps in a row that end a run which leaves them out: by then the weights are to blame.
MOST_IN_A_ROW = 10
#: Where the state lies among the arguments that Megatron keeps in every checkpoint.
_SAVED = "amopo_bad_steps"
_NAMED = 10  # records in a message


@dataclass(frozen=True)
class BadStep:
    """What was wrong with a step."""

    reason: str
    loss: float  # mean over the global batch, nats
    grad_norm: float
    records: dict[int, float]  # id → loss, of the whole global batch

    @property
    def suspects(self) -> list[int]:
        """The records whose loss isn't finite; none, if it is the gradient."""
        return [record for record, loss in self.records.items() if not math.isfinite(loss)]

    def message(self, step: int) -> str:
        """What to tell people."""
        if self.suspects:
            named = f"of record(s) {_list(self.suspects)}"
        else:
            worst = sorted(self.records, key=lambda record: -self.records[record])
            named = f"over records {_list(worst)}, by falling loss"
        return f"step {step}: {self.reason}, {named}"


class StoppedByBadStep(AmopoError):
    """Raised on all ranks alike: one of them has to say it."""


class BadSteps:
    """Judges steps, and remembers what is ordinary. An observer of training's micro-batches."""

    def __init__(self, config: BadStepConfig):
        self.config = config
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        self._norm: Any = None  # of the gradient: a number, or a tensor where TE or apex computes it
        self.latest: BadStep | None = None  # of the step that has just ended

    def add(self, batch: GroupBatch, _pairs: Pairs, result: AmopoLoss) -> None:
        """Collect a micro-batch's losses; they stay on their device."""
        self._batches.append((batch.record_ids, batch.counted, result.loss.detach()))

    def begin_step(self) -> None:
        """Before the first micro-batch."""
        self._batches, self._norm, self.latest = [], None, None

    def watch(self, optimizer: Any) -> None:
        """Stand between the gradient's norm and the update of the weights in Megatron's ``optimizer``."""
        measure, clip, update = optimizer.get_grad_norm, optimizer.clip_grad_norm, optimizer.step_with_ready_grads

        def get_grad_norm() -> Any:
            self._norm = measure()
            return self._norm

        def clip_grad_norm(limit: float) -> Any:
            self._norm = clip(limit)
            return self._norm

        def step_with_ready_grads() -> bool:
            norm = get_grad_norm() if self._norm is None else self._norm
            return self._may_update(float(norm)) and update()

        # Before the update, a chain of optimizers calls the first, a single one the second, if it clips at all.
        optimizer.get_grad_norm, optimizer.clip_grad_norm = get_grad_norm, clip_grad_norm
        optimizer.step_with_ready_grads = step_with_ready_grads

    def _may_update(self, norm: float) -> bool:
        """The verdict on a step whose gradient has this norm. A collective call of all ranks."""
        first = mpu.get_tensor_model_parallel_rank() == 0  # the others of its group hold the same
        rows = self._batches if first else []
        sums = torch.zeros(4, dtype=torch.float64, device=device.current_device())
        for _, counted, losses in rows:
            kept = torch.where(counted, losses, 0.0)
            sums[:3] += torch.stack([kept.double().sum(), counted.sum().double(), (~kept.isfinite()).sum().double()])
        sums[3] = norm
        dist.all_reduce(sums)
        total, count, not_finite, norms = sums.tolist()
        loss, norm = total / max(count, 1), norms / dist.get_world_size()
        reason = self._reason(loss, norm, not_finite > 0)
        if reason is None:
            self._losses.append(loss)
            self._norms.append(norm)
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        mine = [(ids[counted].tolist(), losses[counted].tolist()) for ids, counted, losses in rows]
        self.latest = BadStep(reason, loss, norm, worst_losses(pair for rank in gathered(mine) for pair in rank))
        return False

    def _reason(self, loss: float, norm: float, not_finite: bool) -> str | None:
        if not_finite:
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        for what, value, before, most in (
            ("gradient norm", norm, self._norms, self.config.grad_norm_spike),
            ("loss", loss, self._losses, self.config.loss_spike),
        ):
            if most is None or len(before) < LEAST:
                continue
            median = statistics.median(before)
            if 0 < most * median < value:
                return f"the {what} {value:.4g} is {value / median:.3g} times the median of {len(before)} steps before"
        return None

    def check(self, step: int) -> None:
        """After a step: whether the run goes on.

        Raises:
            StoppedByBadStep: it doesn't.
        """
        if self.latest is None:
            return
        said = self.latest.message(step)
        if self.config.action == "stop":
            raise StoppedByBadStep(
                f"{said}. The weights are those of step {step - 1}. To go on without such steps, resume with "
                "--amopo-on-bad-step skip"
            )
        if self._in_a_row == MOST_IN_A_ROW:
            raise StoppedByBadStep(f"{said}. It is the {MOST_IN_A_ROW}th step in a row that --amopo-on-bad-step skips")

    def save_into(self, args: Namespace) -> None:
        """Put what is remembered where the next checkpoint of ``args`` keeps it."""
        setattr(args, _SAVED, {"losses": [*self._losses], "norms": [*self._norms], "in_a_row": self._in_a_row})

    def restore(self, checkpoint_args: Namespace) -> None:
        """Take what a checkpoint kept; one of before these flags has nothing."""
        saved = getattr(checkpoint_args, _SAVED, None)
        if saved is not None:
            self._losses.extend(saved["losses"])
            self._norms.extend(saved["norms"])
            self._in_a_row = saved["in_a_row"]


def worst_losses(batches: Iterable[tuple[list[int], list[float]]]) -> dict[int, float]:
    """Of micro-batches' record ids and losses, each record's worst: at an epoch's end a batch may have one twice."""
    worst: dict[int, float] = {}
    for ids, losses in batches:
        for record, loss in zip(ids, losses, strict=True):
            before = worst.get(record, -math.inf)
            worst[record] = before if math.isnan(before) or loss < before else loss
    return worst


def _list(records: list[int]) -> str:
    return ", ".join(map(str, records[:_NAMED])) + (", …" if len(records) > _NAMED else "")
