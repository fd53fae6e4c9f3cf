"""Objectives: free functions from log-probabilities to losses. Imports torch and NumPy, never Megatron."""

from megatron_amopo.objectives.amopo import (
    PAIRWISE_LOSSES,
    WEIGHTINGS,
    AmopoLoss,
    amopo_loss,
    pairwise_parameters,
    sft_loss,
)
from megatron_amopo.objectives.noise import record_noise

__all__ = [
    "PAIRWISE_LOSSES",
    "WEIGHTINGS",
    "AmopoLoss",
    "amopo_loss",
    "pairwise_parameters",
    "record_noise",
    "sft_loss",
]
