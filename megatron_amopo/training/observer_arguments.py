"""The flags of what a run records beyond its metrics: ledger, leakage matrix, conflict meter, FP8 check.

Takes the command line and what the data has; gives an :class:`ObserverConfig`, or an error where a flag would record
nothing. Needs no Megatron.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_amopo.errors import ConfigError

_INTERVALS = ("amopo_conflict_interval", "amopo_fp8_check_interval")


@dataclass(frozen=True)
class ObserverConfig:
    """What is recorded; nothing by default."""

    ledger: bool = False
    leakage_of: tuple[str, ...] = ()  # dimensions whose preferences the leakage matrix follows
    conflict_interval: int | None = None  # steps
    fp8_check_interval: int | None = None  # steps


def add_observer_arguments(group: Any) -> None:
    """Add the flags to an argument group or parser."""
    add = group.add_argument
    add(
        "--amopo-ledger",
        action="store_true",
        help="write every record's figures of every epoch and dimension to Parquet files in SAVE/ledger",
    )
    add(
        "--amopo-leakage",
        action="store_true",
        help="at evaluation, measure the margin of each dimension's preference under each dimension's prompt",
    )
    add(
        "--amopo-conflict-interval",
        type=int,
        metavar="N",
        help="every N steps, measure the cosines between the dimensions' gradients at the head's input",
    )
    add(
        "--amopo-fp8-check-interval",
        type=int,
        metavar="N",
        help="every N steps, compute a micro-batch in bf16, too, and record how far FP8 moves log-probabilities and "
        "margins",
    )


def read_observers(
    args: argparse.Namespace, dimensions: Sequence[str], scored: Sequence[str], *, has_validation: bool
) -> ObserverConfig:
    """What the flags ask for.

    Args:
        args: parsed, with the run's length filled in.
        dimensions: the trained dimensions.
        scored: the dimensions that the data has scores of.
        has_validation: whether the data has records to evaluate.

    Raises:
        ConfigError: naming the flag that would record nothing.
    """
    if args.amopo_ledger and args.save is None:
        raise ConfigError("--amopo-ledger writes into the --save folder; give one")
    if args.skip_train:
        for name in ("amopo_ledger", *_INTERVALS):
            if getattr(args, name):
                raise ConfigError(f"--{name.replace('_', '-')} is of training steps; with --skip-train there are none")
    if args.amopo_conflict_interval is not None and len(dimensions) == 1:
        raise ConfigError(
            "--amopo-conflict-interval compares dimensions; with a single one there is nothing to compare"
        )
    for name in _INTERVALS:
        interval = getattr(args, name)
        if interval is None:
            continue
        steps = args.train_iters
        if steps is None:
            steps = args.train_samples // args.global_batch_size  # as Megatron will
        if interval > steps:
            raise ConfigError(
                f"--{name.replace('_', '-')} {interval} is more than the run's {steps} steps: none would be measured"
            )
    if args.amopo_leakage and not scored:
        raise ConfigError("--amopo-leakage: the data has no scored dimension, so none has a preference")
    if args.amopo_leakage and not has_validation:
        raise ConfigError("--amopo-leakage is measured at evaluation, and the data has no validation part")
    return ObserverConfig(
        ledger=args.amopo_ledger,
        leakage_of=tuple(scored) if args.amopo_leakage else (),
        conflict_interval=args.amopo_conflict_interval,
        fp8_check_interval=args.amopo_fp8_check_interval,
    )
