"""Megatron's CUDA calls on a machine without CUDA: each lands on the CPU, and nothing else changes."""

import subprocess
import sys

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


_THAT_STARTS_RANKS = """
import torch
from megatron_amopo.certification.ranks import RankPool
from tests.support.jobs import device_facts

with RankPool(1) as ranks:
    ranks.run(device_facts, 1)
try:
    torch.zeros(1, device="cuda")
except (RuntimeError, AssertionError):
    print("untouched")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is intercepted where CUDA is")
def test_the_process_that_starts_ranks_is_untouched():
    """In one of its own, since other tests compute in this one as ranks do."""
    done = subprocess.run([sys.executable, "-c", _THAT_STARTS_RANKS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "untouched"
