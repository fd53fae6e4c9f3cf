"""Counts of records against packing them, and dealing against training's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_amopo.certification.tiny import random_groups
from megatron_amopo.data.balance import plan_step
from megatron_amopo.data.batching import pack
from megatron_amopo.data.groups import SHARINGS
from megatron_amopo.errors import ConfigError
from megatron_amopo.planning.work import Records, sequences, stated_records

GROUPS = random_groups(12, dimensions=3, seed=4, shared_question=True)


def records(sharing: str) -> Records:
    lengths = np.stack([group.lengths() for group in GROUPS])
    return Records.of(lengths, np.array([group.shared for group in GROUPS]), sharing, "random")


@pytest.mark.parametrize("sharing", SHARINGS)
def test_counts_are_those_of_packed_groups(sharing):
    found = records(sharing)
    for number, group in enumerate(GROUPS):
        batch = pack([group], torch.zeros(1, 3, 2), [True], sharing=sharing)
        branches = batch.segments.branches
        pairs = sum(query + branch.prefix_length + 1 for branch in branches for query in range(branch.num_queries))
        assert found.tokens[number] == batch.num_tokens
        assert found.keys[number] == len(batch.segments.key_index)
        assert found.pairs[number] == pairs
        assert found.rows[number] == len(batch.targets)


def test_a_step_is_dealt_as_in_training():
    found = records("tree")
    step = found.step(global_batch=12, micro_batch=2, dp=3)
    assert step.micro_batches == 2
    assert step.mean.tokens * 6 == pytest.approx(found.tokens.sum())
    assert step.longest.tokens >= max(step.mean.tokens, found.tokens.max())
    assert 1 < step.imbalance < 1.5  # lengths differ, dealing evens them out
    alone = found.step(global_batch=12, micro_batch=1, dp=12)
    assert alone.longest.tokens == found.tokens.max()
    assert alone.imbalance == pytest.approx(found.tokens.max() / found.tokens.mean())


def test_the_longest_micro_batch_is_one_of_any_shuffle():
    """Of 1,000 steps an epoch, one with the longest record; then of batches that reach over an epoch's end."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(20, 60, (8_000, 2, 3))
    lengths[4_321] = 900
    many = Records.of(lengths, np.zeros(8_000), "none", "random")
    assert many.step(global_batch=8, micro_batch=1, dp=4).longest.tokens == many.tokens.max() == 2 * 4 * 900
    few = Records.of(lengths[4_310:4_322], np.zeros(12), "none", "random")
    for found, micro_batch, dp in ((many, 2, 2), (few, 2, 2), (few, 4, 2), (few, 8, 1)):
        longest = found.step(global_batch=8, micro_batch=micro_batch, dp=dp).longest.tokens
        order = np.concatenate([rng.permutation(len(found)) for _ in range(2 if found is many else 300)])
        steps = order[: len(order) // 8 * 8].reshape(-1, 8)
        plans = [plan_step(found.tokens[one], num_micro_batches=8 // micro_batch // dp, dp_size=dp) for one in steps]
        assert max(plan.tokens.max() for plan in plans) <= longest


def test_stated_lengths_may_meet():
    """Of stated records the longest may be any number of a step's."""
    found = stated_records(dimensions=2, prompt_tokens=100, response_tokens=600, longest_response_tokens=1_250)
    assert found.tokens.max() == 5_200
    assert found.step(global_batch=64, micro_batch=2, dp=8).longest.tokens == 2 * 5_200


def test_stated_lengths():
    found = stated_records(dimensions=3, prompt_tokens=40, response_tokens=20, longest_response_tokens=90)
    assert found.tokens[0] == 3 * (40 + 180)
    assert (found.tokens[1:] == 3 * (40 + 40)).all()
    shared = stated_records(dimensions=3, prompt_tokens=40, response_tokens=20, shared_tokens=30)
    assert (shared.tokens == 3 * 80 - 2 * 30).all()
    for wrong in (
        {"prompt_tokens": 0},
        {"shared_tokens": 40},
        {"longest_response_tokens": 10},
        {"dimensions": 0},
    ):
        with pytest.raises(ConfigError, match="--"):
            stated_records(**{"dimensions": 3, "prompt_tokens": 40, "response_tokens": 20, **wrong})


def test_plain_sequences():
    step = sequences(length=8, micro_batch=2, micro_batches=5)
    assert (step.mean.tokens, step.mean.pairs, step.mean.rows) == (16, 2 * 36, 16)
    assert step.mean.keys_per_query == pytest.approx(9)
