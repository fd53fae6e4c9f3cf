"""Rotary position embedding at explicit positions.

Responses of a pair both start where their prompt ends, so positions are data and come with the micro-batch. Angles
are an elementwise float32 product, not a matrix product: containers switch TF32 on for those, which would round
positions above 2,048.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of a rotary embedding to longer texts; field names are those of `config.json`.

    Frequencies whose wavelength (in tokens) is longer than `original_max_position_embeddings / low_freq_factor` are
    divided by `factor`; those shorter than `… / high_freq_factor` stay; between the two the share that stays grows
    linearly with the frequency.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Scaled frequencies, radians per token, any shape."""
        turns = frequencies * (self.original_max_position_embeddings / (2 * math.pi))  # in the original context
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


class PackedRotaryEmbedding(torch.nn.Module):
    """Rotary angles at explicit positions, called as Megatron calls its multimodal rotary embedding."""

    def __init__(self, head_size: int, base: float, scaling: Llama3Scaling | None = None):
        super().__init__()
        self.head_size = head_size
        self.base = base
        self.scaling = scaling

    def forward(self, position_ids: Tensor, mrope_section: Any = None, cp_group: Any = None) -> Tensor:
        """``position_ids [1, T]`` to angles ``[T, 1, 1, head size]`` (rotate-half layout), float32."""
        exponents = torch.arange(0, self.head_size, 2, dtype=torch.float32, device=position_ids.device) / self.head_size
        frequencies = 1.0 / self.base**exponents
        if self.scaling is not None:
            frequencies = self.scaling(frequencies)
        angles = position_ids[0].float()[:, None] * frequencies
        return torch.cat([angles, angles], dim=-1)[:, None, None]
