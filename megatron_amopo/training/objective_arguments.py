"""The flags of the objective: pair loss, weights over dimensions, their hyperparameters, margin floors.

Takes the command line and the dimensions of the data; gives an :class:`~megatron_amopo.objectives.ObjectiveConfig`.
What the flags mean, their published values and which of them go together is the registry's business
(``objectives/registry.py``); here text becomes numbers. Needs no Megatron.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from megatron_amopo.errors import ConfigError
from megatron_amopo.objectives import PAIRWISE_LOSSES, WEIGHTINGS, ObjectiveConfig, choose_objective
from megatron_amopo.objectives.choice import DEFAULT_WEIGHTING, flag_of
from megatron_amopo.objectives.floors import DEFAULT_LR
from megatron_amopo.objectives.registry import MODPO_MARGINS

#: Hyperparameters, each set by the flag of its name.
_HYPERPARAMETERS = (
    "beta",
    "gamma",
    "label_smoothing",
    "modpo_weights",
    "modpo_objective",
    "modpo_margins",
    "weights",
    "weight_temperature",
    "weight_floor",
)


def add_objective_arguments(group: Any) -> None:
    """Add the flags to an argument group or parser."""
    add = group.add_argument
    add(
        "--amopo-pairwise", choices=list(PAIRWISE_LOSSES), default="simpo", help="loss of a pair (default: %(default)s)"
    )
    add("--amopo-beta", type=float, help=f"β of the pair loss (default, published: {_published('beta')})")
    add("--amopo-gamma", type=float, help=f"γ, target margin (default, published: {_published('gamma')})")
    add(
        "--amopo-label-smoothing",
        type=float,
        metavar="E",
        help=f"ε, how often the order of a pair is believed to be wrong (default: {_published('label_smoothing')})",
    )
    add(
        "--amopo-modpo-weights",
        metavar="A=W,…",
        help="modpo: weight of each objective, summing to 1, e.g. helpfulness=0.5,correctness=0.5; names are scored "
        "dimensions of the data",
    )
    add(
        "--amopo-modpo-objective",
        metavar="A",
        help="modpo: the objective that the order of the pairs is taken to be of; the others move its margin",
    )
    add(
        "--amopo-modpo-margins",
        choices=MODPO_MARGINS,
        help="modpo: what margins are computed from, the records' scores or a reward model's rewards, prepared with "
        "--rewards (default: scores)",
    )
    add(
        "--amopo-ftx-gamma",
        type=float,
        default=0.0,
        help="γ_ftx, weight of the SFT term on the chosen response (default: 0)",
    )
    add(
        "--amopo-weighting",
        choices=list(WEIGHTINGS),
        default=DEFAULT_WEIGHTING,
        help="weights over dimensions (default: %(default)s)",
    )
    add("--amopo-weights", metavar="A=W,…", help="fixed: weight of each trained dimension, e.g. general=1,accuracy=2")
    add(
        "--amopo-weight-temperature",
        type=float,
        metavar="T",
        help=f"what the weights' metric is divided by (default, published: {_published('weight_temperature')})",
    )
    add(
        "--amopo-weight-floor",
        metavar="F or A=F,…",
        help="the least weight of every dimension, or of each named one; what is left is shared out as before "
        f"(default, published: {_published('weight_floor')})",
    )
    add(
        "--amopo-margin-floor",
        metavar="A=M,…",
        help="the least mean margin of named dimensions, nats per token, e.g. correctness=0.5: each has a multiplier "
        "that rises while its margin is smaller",
    )
    add(
        "--amopo-margin-floor-lr",
        type=float,
        metavar="η",
        help=f"step size of the floors' multipliers, per nat per token and step (default: {DEFAULT_LR})",
    )


def read_objective(
    args: argparse.Namespace, dimensions: Sequence[str], scored: Sequence[str], rewarded: Sequence[str] = ()
) -> ObjectiveConfig:
    """The objective that the flags name.

    Args:
        args: parsed.
        dimensions: the trained dimensions.
        scored: the dimensions that the data has scores of.
        rewarded: the rewards that it has.

    Raises:
        ConfigError: naming the flag.
    """
    given = {name: getattr(args, f"amopo_{name}") for name in _HYPERPARAMETERS}
    for name in ("modpo_weights", "weights"):
        given[name] = _named_numbers(name, given[name])
    if given["weight_floor"] is not None:
        try:
            given["weight_floor"] = float(given["weight_floor"])
        except ValueError:
            given["weight_floor"] = _named_numbers("weight_floor", given["weight_floor"])
    return choose_objective(
        dimensions,
        scored,
        rewarded,
        pairwise=args.amopo_pairwise,
        weighting=args.amopo_weighting,
        ftx_gamma=args.amopo_ftx_gamma,
        margin_floor=_named_numbers("margin_floor", args.amopo_margin_floor),
        margin_floor_lr=args.amopo_margin_floor_lr,
        hyperparameters=given,
    )


def _named_numbers(name: str, text: str | None) -> dict[str, float] | None:
    """``a=1,b=2`` as a dictionary."""
    if text is None:
        return None
    numbers: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key in numbers:
            raise ConfigError(f"{flag_of(name)} {text}: names '{key}' twice")
        try:
            numbers[key] = float(value)
        except ValueError:
            key = ""
        if not key:
            raise ConfigError(
                f"{flag_of(name)} {text}: expected name=number, separated by commas, as in helpfulness=2,correctness=1"
            )
    return numbers


def _published(hyperparameter: str) -> str:
    """Its published values: ``simpo 0.8, orpo 0.1``, or one for all that read it alike."""
    methods = [*PAIRWISE_LOSSES.items(), *WEIGHTINGS.items()]
    values = {name: method.defaults[hyperparameter] for name, method in methods if hyperparameter in method.defaults}
    if len(values) > 1 and len(set(values.values())) == 1:
        return f"{next(iter(values.values()))} ({', '.join(values)})"
    return ", ".join(f"{name} {value}" for name, value in values.items())
