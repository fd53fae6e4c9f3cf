"""Jobs for :class:`megatron_amopo.certification.ranks.RankPool` about runs that something happens to."""

import os
import resource
from dataclasses import replace
from unittest.mock import patch

import torch
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


def command_with_factor(flags: list[str], record: int, factor: float, *, least: int = 16) -> tuple[int, str, str]:
    """:func:`tests.support.jobs.command` with one record's loss multiplied; ``least`` steps make a median."""
    from megatron_amopo.training import bad_steps, step

    compute, objective = step.loss_and_metrics, step.amopo_loss
    ids: list[torch.Tensor] = []

    def compute_of_known_records(part, *rest, **options):
        ids[:] = [part.batch.record_ids]
        return compute(part, *rest, **options)

    def changed_objective(*inputs):
        result = objective(*inputs)
        return replace(result, loss=result.loss * torch.where(ids[0] == record, factor, 1.0))

    with (
        patch.object(step, "loss_and_metrics", compute_of_known_records),
        patch.object(step, "amopo_loss", changed_objective),
        patch.object(bad_steps, "LEAST", least),
    ):
        return command(flags)


def command_on_a_small_disk(flags: list[str], *, most_bytes: int) -> tuple[int, str, str]:
    """:func:`tests.support.jobs.command` where no file can become larger than ``most_bytes``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        return command(flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
