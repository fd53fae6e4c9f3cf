"""The flags of what a run does when something goes wrong: which checkpoints stay, what a bad step leads to.

Takes the command line; gives a :class:`SurvivalConfig`, or an error where flags contradict each other. Needs no
Megatron.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_amopo import device
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


@dataclass(frozen=True)
class SurvivalConfig:
    """What is kept and tolerated."""

    retention: Retention = Retention()


def add_survival_arguments(group: Any) -> None:
    """Add the flags to an argument group or parser."""
    group.add_argument(
        "--amopo-keep-checkpoints",
        type=int,
        metavar="K",
        help="delete all but the newest K checkpoints of --save, when a newer one is complete; those of every "
        "--save-retain-interval steps stay (default: all stay)",
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


def read_survival(args: argparse.Namespace) -> SurvivalConfig:
    """What the flags ask for. What Megatron would do by itself, less safely, is switched off in ``args``.

    Args:
        args: parsed and validated.

    Raises:
        ConfigError: naming the flag that would do nothing.
    """
    if args.amopo_keep_checkpoints is not None and args.save is None:
        raise ConfigError("--amopo-keep-checkpoints is of the checkpoints in --save; give that, too")
    every, args.save_retain_interval = args.save_retain_interval, None
    newest = args.amopo_keep_checkpoints
    if newest is None and every is not None:
        newest = 1  # as Megatron means it
    return SurvivalConfig(Retention(newest, every))
