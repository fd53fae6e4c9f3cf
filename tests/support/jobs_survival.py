"""Jobs for :class:`megatron_amopo.certification.ranks.RankPool` about runs that something happens to."""

import multiprocessing
import os
import resource
import signal
import time
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
        return replace(result, loss=torch.where(ids[0] == record, result.loss * factor, result.loss))

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


def seconds_after_death(flags: list[str], *, rank: int, step: int) -> tuple[int, float, str]:
    """A run on forks of the ranks, one of which dies (SIGKILL) in the middle of a step: its exit code, when it ended
    (by a clock that all ranks share), what it said.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        code, _, errors = command_with_signal(flags, signal.SIGKILL, rank=rank, step=step)
        theirs.send((code, errors))
        os._exit(code)

    process = context.Process(target=run)
    process.start()
    theirs.close()
    process.join(120)
    ended = time.monotonic()
    hangs = process.is_alive()
    process.kill()
    process.join()
    code, errors = ours.recv() if ours.poll() and not hangs and process.exitcode != -signal.SIGKILL else (None, "")
    return (process.exitcode if code is None else code), ended, errors
