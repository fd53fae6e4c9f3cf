"""The flags of what a run does when something goes wrong: which checkpoints stay, what a bad step leads to.

Takes the command line; gives a :class:`SurvivalConfig`, or an error where flags contradict each other. Needs no
Megatron.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_amopo import device
from megatron_amopo.checkpoint.iterations import iteration_folder, iterations, why_unusable
from megatron_amopo.errors import ConfigError


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest ``newest`` and those of every ``every``-th step; None for no limit, and for
    no such steps.
    """

    newest: int | None = None
    every: int | None = None

    def superfluous(self, steps: Sequence[int], current: int) -> list[int]:
        """Of usable checkpoints' ``steps``, newest first, those to delete. The ``current`` one, and those beyond it
        (a future that somebody has gone back from), stay.
        """
        if self.newest is None:
            return []
        past = [step for step in steps if step <= current]
        return [step for step in past[self.newest :] if step != current and not (self.every and step % self.every == 0)]


def is_usable(path: Path) -> bool:
    """Whether an iteration's folder is complete."""
    return why_unusable(path) is None


def superfluous(
    folder: Path, retention: Retention, current: int, usable: Callable[[Path], bool] = is_usable
) -> list[Path]:
    """The checkpoints in ``folder`` to delete, when the tracker names ``current``: none unless that one is usable. What
    can't be loaded isn't counted, and stays; so does a link, as what it names lies elsewhere.
    """
    if retention.newest is None or not usable(iteration_folder(folder, current)):
        return []
    numbers = [number for number in iterations(folder) if usable(iteration_folder(folder, number))]
    found = [iteration_folder(folder, number) for number in retention.superfluous(numbers, current)]
    return [path for path in found if not path.is_symlink()]


@dataclass(frozen=True)
class BadStepConfig:
    """What a bad step leads to, and beside losses and gradients that aren't finite, what makes one: multiples of the
    median of the steps before, None for none.
    """

    action: Literal["stop", "skip"] = "stop"
    loss_spike: float | None = None
    grad_norm_spike: float | None = None


@dataclass(frozen=True)
class SurvivalConfig:
    """What is kept and tolerated."""

    retention: Retention
    bad_steps: BadStepConfig


def add_survival_arguments(group: Any) -> None:
    """Add the flags to an argument group or parser."""
    group.add_argument(
        "--amopo-keep-checkpoints",
        type=int,
        metavar="K",
        help="delete all but the newest K checkpoints of --save, when a newer one is complete; those of every "
        "--save-retain-interval steps stay (default: all stay)",
    )

    group.add_argument(
        "--amopo-on-bad-step",
        choices=["stop", "skip"],
        default="stop",
        help="what a step leads to whose loss or gradient is not finite, or a spike: the end of the run, or nothing "
        "but a line in the log; either way the weights stay as they were (default: %(default)s)",
    )
    for name, what in (("loss", "mean loss"), ("grad-norm", "gradient's norm")):
        group.add_argument(
            f"--amopo-{name}-spike",
            type=float,
            metavar="X",
            help=f"a step is bad if its {what} is more than X times the median of the steps before (default: no limit)",
        )


def prepare_async_save(args: argparse.Namespace) -> None:
    """Choose what writes checkpoints under ``--async-save``, before Megatron validates its flags: with CUDA the process
    that ``--use-persistent-ckpt-worker`` starts, which Megatron would otherwise refuse by saving synchronously.
    """
    if args.async_save:
        args.use_persistent_ckpt_worker = True
        if importlib.util.find_spec("nvidia_resiliency_ext") is None:
            args.async_strategy = "mcore"


def choose_async_writer(args: argparse.Namespace) -> None:
    """After the validation: without CUDA, a forked process writes each checkpoint. What it inherits is a snapshot of
    memory, where the persistent worker would share it with the optimizer, which goes on meanwhile.
    """
    if args.async_save and not device.has_cuda():
        args.use_persistent_ckpt_worker = False


def read_retention(args: argparse.Namespace) -> Retention:
    """Which checkpoints the flags let stay, told before :func:`read_survival`."""
    newest, every = args.amopo_keep_checkpoints, args.save_retain_interval
    return Retention(1 if newest is None and every is not None else newest, every)  # alone it is as Megatron means it


def read_survival(args: argparse.Namespace) -> SurvivalConfig:
    """What the flags ask for. What Megatron would do by itself, less safely, is switched off in ``args``.

    Args:
        args: parsed and validated.

    Raises:
        ConfigError: naming the flag that would do nothing.
    """
    if args.amopo_keep_checkpoints is not None and args.save is None:
        raise ConfigError("--amopo-keep-checkpoints is of the checkpoints in --save; give that, too")
    retention = read_retention(args)
    args.save_retain_interval = None
    bad_steps = BadStepConfig(args.amopo_on_bad_step, args.amopo_loss_spike, args.amopo_grad_norm_spike)
    for name in ("amopo_loss_spike", "amopo_grad_norm_spike"):
        limit = getattr(args, name)
        if limit is not None and not (math.isfinite(limit) and limit > 1):
            raise ConfigError(f"--{name.replace('_', '-')} is {limit}; expected more than 1, a multiple of the median")
    args.check_for_nan_in_loss_and_grad = False  # Megatron's: a look at every bucket, which can't name the records
    return SurvivalConfig(retention, bad_steps)
