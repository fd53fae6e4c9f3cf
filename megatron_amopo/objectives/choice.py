"""From what a person asks for to an objective that can be computed, or an error that says why not.

Takes the names of a pair loss and a weighting, the hyperparameters given for them and the dimensions of a run; gives an
:class:`ObjectiveConfig`, whose functions know their hyperparameters. A hyperparameter that nothing would read is
refused: ignoring it would be a wrong answer without a word. Messages name the flags that set what they are about; the
functions work without a command line, too.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from megatron_amopo.errors import ConfigError
from megatron_amopo.objectives.floors import DEFAULT_LR, MarginFloors
from megatron_amopo.objectives.pairs import Pairs
from megatron_amopo.objectives.registry import MODPO_MARGINS, PAIRWISE_LOSSES, WEIGHTINGS, Hyperparameter, Method

DEFAULT_WEIGHTING = "gaussian"
_NOTHING: Mapping[str, Hyperparameter | None] = MappingProxyType({})


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss of a record, chosen and checked: what :func:`choose_objective` gives."""

    pair_loss: Callable[[Pairs], Tensor]  # [G, D]
    weigh: Callable[[Pairs], Tensor]  # [G, D]
    ftx_gamma: float  # γ_ftx
    margin_floors: MarginFloors
    needs_reference: bool  # reads Pairs.reference_logps
    flags: dict[str, Any]  # what was chosen, published values filled in, by flag


def choose_objective(
    dimensions: Sequence[str],
    scored: Sequence[str] = (),
    rewarded: Sequence[str] = (),
    *,
    pairwise: str = "simpo",
    weighting: str = DEFAULT_WEIGHTING,
    ftx_gamma: float = 0.0,
    margin_floor: Mapping[str, float] | None = None,
    margin_floor_lr: float | None = None,
    hyperparameters: Mapping[str, Hyperparameter | None] = _NOTHING,
) -> ObjectiveConfig:
    """Look up, fill in, check and bind.

    Args:
        dimensions: names of the D dimensions that are trained, in their order.
        scored: names of the K dimensions that the data has scores of, in the data's order; one that is trained and
            isn't among them is the general prompt.
        rewarded: names of the R rewards of a reward model that the data has, in the data's order.
        pairwise: a name of :data:`PAIRWISE_LOSSES`.
        weighting: a name of :data:`WEIGHTINGS`.
        ftx_gamma: weight of the SFT term, ≥ 0.
        margin_floor: the least mean margin of some trained dimensions, nats per token.
        margin_floor_lr: step size of the floors' multipliers, > 0; None for :data:`DEFAULT_LR`.
        hyperparameters: by their names; one that is absent or None has its published value.

    Raises:
        ConfigError: an unknown name, a hyperparameter that nothing reads, is missing, or has a value or a dimension
            that it can't have.
    """
    _check_number("ftx_gamma", ftx_gamma)
    margin_floors = _margin_floors(margin_floor, margin_floor_lr, dimensions)
    given = {name: value for name, value in hyperparameters.items() if value is not None}
    for name in given:
        if not any(name in method.reads for method in (*PAIRWISE_LOSSES.values(), *WEIGHTINGS.values())):
            raise ConfigError(f"unknown hyperparameter '{name}'")
    loss, loss_values = _look_up("pairwise loss", "--amopo-pairwise", pairwise, PAIRWISE_LOSSES, given)
    weights, weight_values = _look_up("weighting", "--amopo-weighting", weighting, WEIGHTINGS, given)
    for name in weight_values:
        if name in given and len(dimensions) == 1:
            raise ConfigError(
                f"{flag_of(name)}: a single dimension has weight 1 whatever it says; leave it out"
                + (f", and --amopo-weighting {weighting} with it" if name in weights.required else "")
            )
    if len(dimensions) == 1 and weighting != DEFAULT_WEIGHTING:
        raise ConfigError(
            f"--amopo-weighting {weighting}: a single dimension has weight 1 whatever it says; leave it out"
        )
    values = {**loss_values, **weight_values}
    for name, value in values.items():
        if isinstance(value, float | int):
            _check_number(name, value)
    for method, what, chosen in ((loss, "--amopo-pairwise", pairwise), (weights, "--amopo-weighting", weighting)):
        if method.needs_scores and not scored:
            raise ConfigError(f"{what} {chosen} needs scores, and the data has no scored dimension")

    loss_keywords: dict[str, Any] = dict(loss_values)
    if "modpo_weights" in values:
        loss_keywords |= _modpo(values, scored, rewarded, margins_given="modpo_margins" in given)
    weight_keywords: dict[str, Any] = dict(weight_values)
    if "weights" in values:
        weight_keywords["weights"] = _fixed_weights(values["weights"], dimensions)
    if "weight_floor" in values:
        weight_keywords["weight_floor"] = _floors(values["weight_floor"], dimensions)
    if weighting == "from-scores":
        columns = {name: column for column, name in enumerate(scored)}
        weight_keywords["score_columns"] = tuple(columns.get(name) for name in dimensions)
    return ObjectiveConfig(
        pair_loss=partial(loss.function, **loss_keywords),
        weigh=partial(weights.function, **weight_keywords),
        ftx_gamma=ftx_gamma,
        margin_floors=margin_floors,
        needs_reference=loss.needs_reference or weights.needs_reference,
        flags={
            "--amopo-pairwise": pairwise,
            **{flag_of(name): value for name, value in loss_values.items()},
            "--amopo-ftx-gamma": ftx_gamma,
            "--amopo-weighting": weighting,
            # A weighting's neutral values are left out: it is the same weighting as of before it had them.
            **{flag_of(name): value for name, value in weight_values.items() if value != weights.defaults.get(name)},
            **_floor_flags(margin_floors),
        },
    )


def flag_of(hyperparameter: str) -> str:
    """The flag that sets a hyperparameter."""
    return "--amopo-" + hyperparameter.replace("_", "-")


def _look_up(
    kind: str, kind_flag: str, name: str, registry: Mapping[str, Method], given: Mapping[str, Hyperparameter]
) -> tuple[Method, dict[str, Hyperparameter]]:
    """The entry and its hyperparameters: what is given, else the published value."""
    if name not in registry:
        raise ConfigError(f"unknown {kind} '{name}'; known: {', '.join(registry)}")
    method = registry[name]
    for key in given:
        readers = [other for other, entry in registry.items() if key in entry.reads]
        if readers and name not in readers:
            raise ConfigError(
                f"{kind} '{name}' has no {key}, which is of {', '.join(readers)}: leave out {flag_of(key)}"
            )
    for key in method.required:
        if key not in given:
            raise ConfigError(f"{kind_flag} {name} needs {flag_of(key)}")
    return method, {**method.defaults, **{key: given[key] for key in method.reads if key in given}}


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{flag_of(name)} is {value}; expected a number")
    if name in ("beta", "weight_temperature", "margin_floor_lr") and value <= 0:
        raise ConfigError(f"{flag_of(name)} is {value}; expected more than 0")
    if name in ("ftx_gamma", "weight_floor") and value < 0:
        raise ConfigError(f"{flag_of(name)} is {value}; expected 0 or more")
    if name == "label_smoothing" and not 0 <= value < 0.5:
        raise ConfigError(f"{flag_of(name)} is {value}; expected 0 or more and less than 0.5")


_MODPO_WEIGHTS, _MODPO_OBJECTIVE, _MODPO_MARGINS = map(flag_of, ("modpo_weights", "modpo_objective", "modpo_margins"))
_WEIGHTS, _WEIGHT_FLOOR = flag_of("weights"), flag_of("weight_floor")
_MARGIN_FLOOR, _MARGIN_FLOOR_LR = flag_of("margin_floor"), flag_of("margin_floor_lr")


def _check_names(flag: str, named: Iterable[str], names: Sequence[str], what: str) -> None:
    for key in named:
        if key not in names:
            raise ConfigError(f"{flag} names '{key}', which is none of the {what}: {', '.join(names)}")


def _vector(flag: str, value: Mapping[str, float], names: Sequence[str], what: str) -> tuple[float, ...]:
    """The numbers given for some of ``names``, in their order, 0 for those that aren't named."""
    _check_names(flag, value, names, what)
    for key, number in value.items():
        if not (math.isfinite(number) and number >= 0):
            raise ConfigError(f"{flag} {key} is {number}; expected 0 or more")
    return tuple(float(value.get(key, 0.0)) for key in names)


def _modpo(
    values: Mapping[str, Any], scored: Sequence[str], rewarded: Sequence[str], *, margins_given: bool
) -> dict[str, Any]:
    weights, objective, margins = values["modpo_weights"], values["modpo_objective"], values["modpo_margins"]
    if margins not in MODPO_MARGINS:
        raise ConfigError(f"{_MODPO_MARGINS} {margins}: expected {' or '.join(MODPO_MARGINS)}")
    if margins == "rewards" and not rewarded:
        raise ConfigError(
            f"{_MODPO_MARGINS} rewards: the data was prepared without rewards; prepare it again with --rewards A,B"
        )
    names, what = (scored, "scored dimensions") if margins == "scores" else (rewarded, "rewards of the data")
    if objective in scored and objective not in names:
        names = (*names, objective)  # its own margin isn't read, so that it needs no reward
    vector = _vector(_MODPO_WEIGHTS, weights, names, what)
    if not math.isclose(math.fsum(vector), 1.0, abs_tol=1e-6):
        raise ConfigError(f"{_MODPO_WEIGHTS} sum to {math.fsum(vector):g}; expected 1")
    if objective not in names:
        raise ConfigError(f"{_MODPO_OBJECTIVE} {objective} is none of the {what}: {', '.join(names)}")
    index = list(names).index(objective)
    if vector[index] <= 0:
        raise ConfigError(
            f"{_MODPO_OBJECTIVE} {objective} has no weight in {_MODPO_WEIGHTS}; that of the trained objective must be "
            "more than 0"
        )
    if margins_given and not any(weight for other, weight in enumerate(vector) if other != index):
        raise ConfigError(
            f"{_MODPO_MARGINS} {margins}: {_MODPO_WEIGHTS} has no objective beside {objective}, whose margin would be "
            "computed; leave it out"
        )
    return {"modpo_weights": vector, "modpo_objective": index}


def _margin_floors(floors: Mapping[str, float] | None, lr: float | None, dimensions: Sequence[str]) -> MarginFloors:
    if not floors:
        if lr is not None:
            raise ConfigError(f"{_MARGIN_FLOOR_LR} is of {_MARGIN_FLOOR}: give that, too, or leave it out")
        return MarginFloors()
    _check_names(_MARGIN_FLOOR, floors, dimensions, "trained dimensions")
    for name, floor in floors.items():
        if not math.isfinite(floor):
            raise ConfigError(f"{_MARGIN_FLOOR} {name} is {floor}; expected a number, in nats per token")
    lr = DEFAULT_LR if lr is None else lr
    _check_number("margin_floor_lr", lr)
    return MarginFloors.of(floors, dimensions, lr)


def _floor_flags(floors: MarginFloors) -> dict[str, Any]:
    """What a run without floors doesn't say."""
    if not floors.names:
        return {}
    return {_MARGIN_FLOOR: dict(zip(floors.names, floors.floors, strict=True)), _MARGIN_FLOOR_LR: floors.lr}


def _fixed_weights(weights: Any, dimensions: Sequence[str]) -> tuple[float, ...]:
    vector = _vector(_WEIGHTS, weights, dimensions, "trained dimensions")
    for name in dimensions:
        if name not in weights:
            raise ConfigError(f"{_WEIGHTS} says nothing of '{name}'; give each trained dimension one, 0 for none")
    if not math.fsum(vector) > 0:
        raise ConfigError(f"{_WEIGHTS} are all 0")
    return vector


def _floors(floor: Any, dimensions: Sequence[str]) -> tuple[float, ...]:
    if isinstance(floor, Mapping):
        vector = _vector(_WEIGHT_FLOOR, floor, dimensions, "trained dimensions")
    else:
        vector = (float(floor),) * len(dimensions)
    if math.fsum(vector) >= 1:
        raise ConfigError(
            f"{_WEIGHT_FLOOR} sums to {math.fsum(vector):g} over {len(dimensions)} dimensions; expected less than 1, "
            "as the weights themselves sum to 1"
        )
    return vector
