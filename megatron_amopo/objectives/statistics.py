"""From log-probabilities per token to the figures per sequence that the objectives take.

Takes the response tokens of all sequences, one sequence after the other; gives sums of log-probabilities and mean and
standard deviation of probabilities. Probabilities are exp(log p): there is no second softmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResponseStatistics:
    """Figures per sequence, each of the shape of ``lengths``."""

    sum_logps: Tensor  # Σ log p over the response, nats; differentiable
    prob_mean: Tensor  # μ of p, no gradient
    prob_std: Tensor  # unbiased σ of p, 0 for a response of one token; no gradient


def response_statistics(logps: Tensor, lengths: Tensor) -> ResponseStatistics:
    """Sum of log-probabilities, mean and unbiased standard deviation of probabilities of each sequence.

    Args:
        logps: ``[N]`` log-probabilities of response tokens, nats, in the order of ``lengths``; differentiable.
        lengths: integers ≥ 1 of any shape that sum to N; its flattened order is that of ``logps``.
    """
    flat = lengths.flatten()
    sum_logps = _segment_sum(logps, flat)
    with torch.no_grad():
        probs = logps.exp()
        mean = _segment_sum(probs, flat) / flat
        deviations = probs - mean.repeat_interleave(flat, output_size=logps.shape[0])
        # One token deviates by nothing from its own mean, so the clamped denominator gives σ = 0.
        std = (_segment_sum(deviations.square(), flat) / (flat - 1).clamp(min=1)).sqrt()
    return ResponseStatistics(sum_logps.view_as(lengths), mean.view_as(lengths), std.view_as(lengths))


def _segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    # float64, because the sum runs from left to right: over a thousand tokens float32 would lose the last digits.
    # Reduces each run in order, unlike index_add_, whose order on CUDA changes from run to run. Lengths sum to N by
    # construction.
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True).to(values.dtype)
