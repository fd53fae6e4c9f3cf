"""Jobs for :class:`megatron_amopo.certification.ranks.RankPool` about runs that something happens to."""

import os
from unittest.mock import patch

import torch.distributed as dist

from tests.support.jobs import command


def command_with_signal(flags: list[str], number: int, *, rank: int, step: int) -> tuple[int, str, str]:
    """:func:`tests.support.jobs.command`, one of whose ranks gets a signal in the middle of a step."""
    from megatron_amopo.training import train

    original = train.Step.__call__
    calls = 0

    def forward(self: train.Step, *inputs):
        nonlocal calls
        calls += 1
        if calls == step and dist.get_rank() == rank:
            os.kill(os.getpid(), number)
        return original(self, *inputs)

    with patch.object(train.Step, "__call__", forward):
        return command(flags)
