"""Two results side by side: relative errors of losses, first gradients, weights and the distance that they moved.

Takes :class:`~megatron_amopo.certification.reference.Result`s, whose tensors have Hugging Face's names; what a layout
computed gets those names by :func:`hugging_face_tensors`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from megatron_amopo.certification.reference import Result
from megatron_amopo.checkpoint.parameters import Parameter


@dataclass(frozen=True)
class Errors:
    """Relative errors of one result against another."""

    loss: float  # of the worst step
    grad: float  # the first step's gradients: norm of the difference over the norm, all tensors together
    weight: float  # weights after the last step, likewise
    moved: float  # the distance from the first weights to the last, likewise: far smaller than the weights
    adam_loss: float  # of the worst step under Adam

    def exceeded(self, limits: "Errors") -> list[str]:
        """Which kinds are above their limit, or are no number."""
        own, most = asdict(self), asdict(limits)
        return [kind for kind, value in own.items() if not value <= most[kind]]

    def worst_of(self, other: "Errors") -> "Errors":
        """The larger one of each kind."""
        return Errors(**{kind: _worse(value, asdict(other)[kind]) for kind, value in asdict(self).items()})


def compare(actual: Result, expected: Result, adam: Sequence[float], expected_adam: Sequence[float]) -> Errors:
    """Errors of ``actual`` against ``expected``; ``adam`` and ``expected_adam`` are the losses of runs with Adam."""
    moved = [
        {name: weight.double() - result.initial[name].double() for name, weight in result.weights.items()}
        for result in (actual, expected)
    ]
    return Errors(
        loss=_loss_error(actual.losses, expected.losses),
        grad=relative_error(actual.gradients, expected.gradients),
        weight=relative_error(actual.weights, expected.weights),
        moved=relative_error(*moved),
        adam_loss=_loss_error(adam, expected_adam),
    )


def relative_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of ``expected``, all tensors together.

    Raises:
        ValueError: the names differ.
    """
    if actual.keys() != expected.keys():
        raise ValueError(f"tensors of one side only: {sorted(actual.keys() ^ expected.keys())}")
    difference = total = 0.0
    for name, reference in expected.items():
        difference += (actual[name].double() - reference.double()).square().sum().item()
        total += reference.double().square().sum().item()
    return (difference / total) ** 0.5


def hugging_face_tensors(parameters: Sequence[Parameter], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by Megatron's names and shapes, as a checkpoint has them, by Hugging Face's; vocabulary padding is left
    out.

    Raises:
        ValueError: the names aren't those of the model.
    """
    names = {parameter.megatron for parameter in parameters}
    if tensors.keys() != names:
        raise ValueError(f"parameters of one side only: {sorted(tensors.keys() ^ names)}")
    result: dict[str, Tensor] = {}
    for parameter in parameters:
        stored = tensors[parameter.megatron]
        for part in parameter.parts(stored.numel()):  # so large that no tensor is cut
            layer = stored if part.layer is None else stored[part.layer]
            pieces = part.split(layer[part.first_row : part.first_row + part.shape[0]])
            result.update(zip((rows.name for rows in part.pieces), pieces, strict=True))
    return result


def _loss_error(actual: Sequence[float], expected: Sequence[float]) -> float:
    if len(actual) != len(expected):
        raise ValueError(f"{len(actual)} losses, expected {len(expected)}")
    worst = 0.0
    for left, right in zip(actual, expected, strict=True):
        worst = _worse(worst, abs(left - right) / abs(right))
    return worst


def _worse(left: float, right: float) -> float:
    """The larger one; not a number is worse than any."""
    return left if left != left or left > right else right
