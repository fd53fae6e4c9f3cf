"""Noise for the Gaussian weights that belongs to the record, not to the rank, the batch or the moment.

A draw is a pure function of (seed, record, dimension, side, epoch): the counter-based generator Philox4x32-10 (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns that tuple into random bits, Box and Muller's
transform turns the bits into a pair of standard normals, one for the chosen and one for the rejected response. It runs
in NumPy on the host whatever device asks, because transcendental functions differ in their last bit between devices.
"""

import numpy as np
import torch
from torch import Tensor

from megatron_amopo.errors import ConfigError

_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL_INCREMENTS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_LOW_32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def record_noise(seed: int, record_ids: Tensor, num_dimensions: int, epoch: int | Tensor) -> Tensor:
    """Standard normal draws ``[G, D, 2]`` float32 on the device of ``record_ids``, identical on every device and
    layout.

    Args:
        seed: any integer, taken modulo 2**64.
        record_ids: ``[G]`` integers, each ≥ 0; the identity of a record within its data set.
        num_dimensions: D ≥ 1.
        epoch: ≥ 0 and < 2**32, one for all groups or a tensor ``[G]``; the same record draws anew in each epoch.

    Raises:
        ConfigError: a negative record or epoch, or no dimension.
    """
    if num_dimensions < 1:
        raise ConfigError(f"num_dimensions is {num_dimensions}; expected at least 1")
    ids_G = record_ids.detach().cpu().numpy().astype(np.int64)
    epochs_G = np.broadcast_to(np.asarray(epoch, dtype=np.int64), ids_G.shape)
    if ids_G.size and (ids_G.min() < 0 or epochs_G.min() < 0 or epochs_G.max() >= 2**32):
        raise ConfigError("record ids must be ≥ 0 and epochs in [0, 2**32)")

    ids_GD, dimensions_GD = np.broadcast_arrays(
        ids_G.astype(np.uint64)[:, None], np.arange(num_dimensions, dtype=np.uint64)
    )
    epochs_GD = np.broadcast_to(epochs_G.astype(np.uint64)[:, None], ids_GD.shape)
    counter = np.stack([ids_GD & _LOW_32, ids_GD >> _32, dimensions_GD, epochs_GD])
    key = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint64)
    return torch.from_numpy(_box_muller(philox4x32(counter, key)).astype(np.float32)).to(record_ids.device)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32 with ten rounds: ``[4, ...]`` counter words and ``[2]`` key words, 32 bits each in uint64, to ``[4,
    ...]`` words.
    """
    x0, x1, x2, x3 = counter
    for _ in range(_ROUNDS):
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (product1 >> _32) ^ x1 ^ key[0],
            product1 & _LOW_32,
            (product0 >> _32) ^ x3 ^ key[1],
            product0 & _LOW_32,
        )
        key = (key + _WEYL_INCREMENTS) & _LOW_32
    return np.stack([x0, x1, x2, x3])


def _box_muller(words: np.ndarray) -> np.ndarray:
    """``[4, ...]`` random 32-bit words to ``[..., 2]`` independent standard normals (Box and Muller, 1958)."""
    # 53 bits each; + ½ keeps the logarithm's argument off zero.
    u0, u1 = (((words[i] << np.uint64(21)) ^ (words[i + 1] >> np.uint64(11))) + 0.5 for i in (0, 2))
    radius = np.sqrt(-2.0 * np.log(u0 * 2.0**-53))
    angle = 2.0 * np.pi * u1 * 2.0**-53
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
