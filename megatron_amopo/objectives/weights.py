"""Weights over the dimensions of a record: free functions, no gradient.

Shapes ride in names: G groups (records), D dimensions, 2 sides (chosen, rejected). Every function takes the statistics
of the response tokens' probabilities and gives ``[G, D]`` weights that are positive and sum to one over the dimensions
of each record.
"""

import torch
from torch import Tensor


@torch.no_grad()
def gaussian(prob_mean_GD2: Tensor, prob_std_GD2: Tensor, noise_GD2: Tensor) -> Tensor:
    """Weights of AMoPO (arXiv 2506.07165): w = softmax over d of (m_chosen,d + m_rejected,d) with m = μ + σ·z, z ~ N(0,
    1).

    Args:
        prob_mean_GD2: μ, mean probability of the response's tokens, in [0, 1].
        prob_std_GD2: σ, their unbiased standard deviation; 0 for a response of one token.
        noise_GD2: z, standard normal, as from :func:`megatron_amopo.objectives.record_noise`.
    """
    metric_GD2 = prob_mean_GD2 + prob_std_GD2 * noise_GD2
    return torch.softmax(metric_GD2.sum(-1), dim=-1)


@torch.no_grad()
def uniform(prob_mean_GD2: Tensor, prob_std_GD2: Tensor, noise_GD2: Tensor) -> Tensor:
    """The same weight 1/D for every dimension; what the adaptive weights are compared with."""
    return torch.full_like(prob_mean_GD2[..., 0], 1.0 / prob_mean_GD2.shape[1])
