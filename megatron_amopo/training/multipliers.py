"""The multipliers of margin floors: the state of a run beside its weights, the same on every rank.

Takes each step's reduced metrics; gives λ to the next step's loss, to the log and to checkpoints. The equations are in
``objectives/floors.py``. A run without floors has none, and nothing is communicated.
"""

import math
from argparse import Namespace
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amopo import device
from megatron_amopo.errors import CheckpointError
from megatron_amopo.objectives import MarginFloors, dual_ascent

#: Kind of the metric, ``multiplier/dimension``: loss per nat per token.
METRIC = "multiplier"
#: Where they lie among the arguments that Megatron keeps in every checkpoint, by dimension.
_SAVED = "amopo_multipliers"


class NoMultipliers(CheckpointError):
    """Raised on all ranks alike: one of them has to say it."""


class Multipliers:
    """λ of each floor, 0 at the start of a run."""

    def __init__(self, floors: MarginFloors):
        self.floors = floors
        self._values: Tensor | None = None
        self._restored: dict[str, float] | None = None

    @property
    def values(self) -> Tensor | None:
        """λ ``[F]``, float32 on the device; None without floors."""
        if self.floors.names and self._values is None:
            # Only now, as this rank's device isn't known when the run is put together.
            start = self._restored or {}
            self._values = torch.tensor(
                [start.get(name, 0.0) for name in self.floors.names],
                dtype=torch.float32,
                device=device.current_device(),
            )
        return self._values

    def metrics(self) -> dict[str, Tensor]:
        """λ by metric name."""
        if self.values is None:
            return {}
        return {f"{METRIC}/{name}": value for name, value in zip(self.floors.names, self.values, strict=True)}

    def step(self, metrics: Mapping[str, Tensor], *, skipped: bool, grad_norm: float | None) -> None:
        """After an optimizer step: ascend by its mean margins. A collective call of all ranks.

        A step that didn't change the weights, or whose gradient or margins aren't finite, doesn't change λ either.

        Args:
            metrics: means over the global batch; read on the last rank, which is of the last pipeline stage.
            skipped: whether the optimizer left the weights alone.
            grad_norm: of the step, None where it isn't computed.
        """
        if (values := self.values) is None:
            return
        last = dist.get_world_size() - 1
        if dist.get_rank() == last and not skipped and (grad_norm is None or math.isfinite(grad_norm)):
            means = torch.stack([metrics[f"margin/{name}"].reshape(()) for name in self.floors.names]).float()
            ascended = dual_ascent(values, means, self.floors)
            values.copy_(torch.where(means.isfinite().all(), ascended, values))
        # All last-stage ranks could compute it. One of them saying it leaves no room for differing by rounding.
        dist.broadcast(values, src=last)

    def save_into(self, args: Namespace) -> None:
        """Put λ where the next checkpoint of ``args`` keeps it."""
        if self.values is not None:
            setattr(args, _SAVED, dict(zip(self.floors.names, self.values.tolist(), strict=True)))

    def restore(self, checkpoint_args: Namespace) -> None:
        """Take λ from a checkpoint's arguments.

        Raises:
            NoMultipliers: it has none of a floor.
        """
        saved = getattr(checkpoint_args, _SAVED, {})
        if missing := [name for name in self.floors.names if name not in saved]:
            raise NoMultipliers(
                f"--load: the checkpoint was saved by a run without --amopo-margin-floor of {', '.join(missing)}; "
                "start a new run from its weights with --finetune and another --save"
            )
        self._restored = saved
