"""Megatron's CUDA calls on a machine without CUDA: each lands on the CPU, and nothing else changes."""

import pytest
import torch

from tests.support.jobs import device_facts


@pytest.fixture(scope="module")
def facts(ranks):
    return ranks.run(device_facts, 1)[0]


def test_factories_and_moves_land_on_the_cpu(facts):
    assert facts["factories"] == ["cpu"] * 5


def test_the_claim_of_cuda_is_confined(facts):
    assert facts["claims"] == [False, True, False]
    assert facts["accelerator"] is False


def test_random_state_and_types(facts):
    assert facts["state restored"]
    assert facts["type"] == "torch.cuda.FloatTensor"
    assert facts["classes"]


def test_this_process_is_untouched():
    """The ranks are processes of their own: the interception must not leak into the tests'."""
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(1, device="cuda")
