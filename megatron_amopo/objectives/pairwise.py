"""Pairwise preference losses: free functions of length-averaged log-probabilities, unreduced.

Each function takes the mean log-probability per response token of a chosen and a rejected response, in nats per token,
as two tensors of one shape, and gives the loss of each pair in that same shape. Nothing here knows about dimensions,
batches or ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def simpo(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): −log σ(β·(c̄ − r̄) − γ).

    Args:
        chosen_mean_logps: c̄, any shape, nats per token.
        rejected_mean_logps: r̄, same shape.
        beta: β, reward scale.
        gamma: γ, target margin in reward units (after multiplication with β).
    """
    return -F.logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def orpo(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6 and 7): −c̄ − β·log σ(log odds(c̄) − log odds(r̄)), odds(x̄) = eˣ̄ / (1 − eˣ̄).

    Args:
        chosen_mean_logps: c̄, any shape, nats per token.
        rejected_mean_logps: r̄, same shape.
        beta: β, weight of the odds-ratio term (λ in the paper).
    """
    log_odds_ratio = _log_odds(chosen_mean_logps) - _log_odds(rejected_mean_logps)
    return -chosen_mean_logps - beta * F.logsigmoid(log_odds_ratio)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 − p)) for p = exp(mean_logps). A p that rounds to 1 counts as 1 − ε, where the odds would be
    infinite.
    """
    below_one = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))
