"""Record noise: the generator against published vectors, the draws' distribution and their independence of everything
else.
"""

import numpy as np
import pytest
import torch

from megatron_amopo.errors import ConfigError
from megatron_amopo.objectives import record_noise
from megatron_amopo.objectives.noise import philox4x32

# Known answers of Philox4x32-10 from the generator's authors (Random123, kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    result = philox4x32(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64))
    assert result[:, 0].tolist() == expected


def test_a_record_draws_the_same_in_any_company_and_order():
    ids = torch.tensor([7, 0, 123_456_789_012, 42, 7])
    together = record_noise(11, ids, 4, epoch=2)
    assert together.shape == (5, 4, 2)
    assert together.dtype == torch.float32
    for row, record in enumerate(ids):
        assert torch.equal(record_noise(11, record[None], 4, epoch=2)[0], together[row])
    assert torch.equal(together[0], together[4])
    assert torch.equal(record_noise(11, ids, 2, epoch=2), together[:, :2])


def test_epochs_may_differ_between_the_groups_of_a_batch():
    ids = torch.tensor([3, 4])
    mixed = record_noise(1, ids, 3, epoch=torch.tensor([0, 5]))
    assert torch.equal(mixed[0], record_noise(1, ids, 3, epoch=0)[0])
    assert torch.equal(mixed[1], record_noise(1, ids, 3, epoch=5)[1])


@pytest.mark.parametrize(
    "change", [{"seed": 12}, {"epoch": 3}, {"seed": 11 + 2**32}, {"record_ids": torch.tensor([8])}]
)
def test_every_argument_matters(change):
    base = {"seed": 11, "record_ids": torch.tensor([7]), "num_dimensions": 4, "epoch": 2}
    assert not torch.isclose(record_noise(**base), record_noise(**{**base, **change})).any()


def test_a_million_draws_are_standard_normal_and_uncorrelated():
    noise = record_noise(2024, torch.arange(125_000), 4, epoch=0).double()
    draws = noise.flatten()
    n = draws.numel()
    assert n == 1_000_000
    # Moments within five standard errors of those of N(0, 1): variances 1/n, 2/n, 15/n, 96/n.
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((draws**power).mean().item() - moment) < 5 * (variance / n) ** 0.5

    # Kolmogorov-Smirnov: sup |F_n − Φ| · √n stays below the 0.1 % critical value 1.95.
    ordered = draws.sort().values
    cdf = torch.special.ndtr(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max()).item() * n**0.5 < 1.95

    # Columns (dimension × side) against each other, and each against the next record's and the next epoch's.
    columns = noise.reshape(125_000, 8)
    limit = 5 / 125_000**0.5
    correlation = torch.corrcoef(columns.T) - torch.eye(8)
    assert correlation.abs().max() < limit
    following = torch.corrcoef(torch.cat([columns[:-1], columns[1:]], dim=1).T)[:8, 8:]
    assert following.abs().max() < limit
    next_epoch = record_noise(2024, torch.arange(125_000), 4, epoch=1).double().reshape(125_000, 8)
    assert torch.corrcoef(torch.cat([columns, next_epoch], dim=1).T)[:8, 8:].abs().max() < limit


def test_refusals():
    with pytest.raises(ConfigError, match="num_dimensions"):
        record_noise(0, torch.tensor([1]), 0, epoch=0)
    with pytest.raises(ConfigError, match="record ids"):
        record_noise(0, torch.tensor([-1]), 1, epoch=0)
