"""The loss of a group: one record seen under D dimension prompts.

    L(record) = Σ_d w_d · L_d  (+ γ_ftx · L_SFT)                                          (AMoPO, arXiv 2506.07165)

Takes per-sequence sums of response log-probabilities and statistics of the response tokens' probabilities; gives one
loss per record. The two tables at the end are the registry: the command line offers exactly what stands there.

Shapes: G groups (records), D dimensions, 2 sides (0 chosen, 1 rejected).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from megatron_amopo.errors import ConfigError
from megatron_amopo.objectives import pairwise as pairwise_losses
from megatron_amopo.objectives import weights as weightings


@dataclass(frozen=True)
class PairwiseLoss:
    """A pairwise loss and the hyperparameters, of ``beta`` and ``gamma``, that it reads, with their published
    values.
    """

    function: Callable[..., Tensor]
    defaults: Mapping[str, float]


@dataclass(frozen=True)
class AmopoLoss:
    """Loss of each record and what it is made of. ``loss`` and ``pair_losses`` carry gradients, ``weights`` doesn't."""

    loss: Tensor  # [G]
    weights: Tensor  # [G, D], sums to 1 over D
    pair_losses: Tensor  # [G, D]


def amopo_loss(
    sum_logps: Tensor,
    lengths: Tensor,
    prob_mean: Tensor,
    prob_std: Tensor,
    noise: Tensor,
    *,
    pairwise: str = "simpo",
    beta: float | None = None,
    gamma: float | None = None,
    weighting: str = "gaussian",
) -> AmopoLoss:
    """Loss of each record: Σ over its dimensions of weight × pairwise loss (arXiv 2506.07165).

    Args:
        sum_logps: ``[G, D, 2]`` Σ log p over response tokens, nats; differentiable.
        lengths: ``[G, D, 2]`` number of response tokens, ≥ 1.
        prob_mean: ``[G, D, 2]`` μ of the response tokens' probabilities.
        prob_std: ``[G, D, 2]`` their unbiased standard deviation σ; 0 where the length is 1.
        noise: ``[G, D, 2]`` standard normal draws, see :func:`record_noise`.
        pairwise: ``simpo`` or ``orpo``.
        beta, gamma: of the pairwise loss; None takes the published value of :data:`PAIRWISE_LOSSES`.
        weighting: ``gaussian`` (published) or ``uniform``.

    Raises:
        ConfigError: an unknown name, shapes that differ, or a ``gamma`` for a pairwise loss that has none.
    """
    shape = sum_logps.shape
    if len(shape) != 3 or shape[-1] != 2:
        raise ConfigError(f"sum_logps has shape {list(shape)}; expected [groups, dimensions, 2]")
    for name, tensor in {"lengths": lengths, "prob_mean": prob_mean, "prob_std": prob_std, "noise": noise}.items():
        if tensor.shape != shape:
            raise ConfigError(f"{name} has shape {list(tensor.shape)}; expected that of sum_logps, {list(shape)}")
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"unknown weighting '{weighting}'; known: {', '.join(WEIGHTINGS)}")
    parameters = pairwise_parameters(pairwise, beta=beta, gamma=gamma)

    mean_logps = sum_logps / lengths
    pair_losses = PAIRWISE_LOSSES[pairwise].function(mean_logps[..., 0], mean_logps[..., 1], **parameters)
    weights = WEIGHTINGS[weighting](prob_mean, prob_std, noise)
    return AmopoLoss(loss=(weights * pair_losses).sum(-1), weights=weights, pair_losses=pair_losses)


def sft_loss(sum_logps: Tensor, lengths: Tensor) -> Tensor:
    """L_SFT ``[G]``: negative log-likelihood per token of the chosen response, averaged over its D prompts; nats per
    token.

    The released code divides by the length twice; here the mean is taken once (DESIGN §1). Arguments as in
    :func:`amopo_loss`.
    """
    return -(sum_logps[..., 0] / lengths[..., 0]).mean(-1)


def pairwise_parameters(pairwise: str, *, beta: float | None, gamma: float | None) -> dict[str, float]:
    """The named loss' hyperparameters: what is given, else its published value.

    Raises:
        ConfigError: an unknown loss, or a hyperparameter that the loss doesn't have (it would be ignored silently).
    """
    if pairwise not in PAIRWISE_LOSSES:
        raise ConfigError(f"unknown pairwise loss '{pairwise}'; known: {', '.join(PAIRWISE_LOSSES)}")
    defaults = PAIRWISE_LOSSES[pairwise].defaults
    given = {name: value for name, value in (("beta", beta), ("gamma", gamma)) if value is not None}
    for name in given:
        if name not in defaults:
            raise ConfigError(f"pairwise loss '{pairwise}' has no {name}; leave it out")
    return {**defaults, **given}


# The defaults are the published runs' hyperparameters (arXiv 2506.07165; released configuration files).
PAIRWISE_LOSSES: Mapping[str, PairwiseLoss] = MappingProxyType(
    {
        "simpo": PairwiseLoss(pairwise_losses.simpo, MappingProxyType({"beta": 0.8, "gamma": 2.0})),
        "orpo": PairwiseLoss(pairwise_losses.orpo, MappingProxyType({"beta": 0.1})),
    }
)
WEIGHTINGS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"gaussian": weightings.gaussian, "uniform": weightings.uniform}
)
