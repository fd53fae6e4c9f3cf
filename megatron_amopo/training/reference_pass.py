"""Reference log-probabilities, computed by the model that is about to be trained, before its first step.

Takes the model with its starting weights, on every rank of any layout; gives Σ log p of every response of the prepared
data. It is the forward pass of training, on the same packed batches, once over all records.

Shapes: N records of a split, D dimensions, 2 sides (chosen, rejected), n response tokens of this rank.
"""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import print_rank_0
from torch import Tensor

from megatron_amopo import device
from megatron_amopo.data.batching import GroupBatch, MicroBatches, SampleOrder
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.objectives.statistics import response_statistics
from megatron_amopo.training.arguments import RunConfig, micro_batch_size_within_budget
from megatron_amopo.training.forward_only import forward_only

_REPORT_S = 20.0


def reference_logps(
    model: Sequence[torch.nn.Module],
    groups: PreparedGroups,
    args: Namespace,
    config: RunConfig,
    reading: Mapping[str, Any],
) -> np.ndarray | None:
    """Σ log p of each response of a split, ``[N, D, 2]`` float32, nats; None on ranks that don't hold the last pipeline
    stage. A collective call of all ranks.

    Args:
        model: this rank's chunks, as Megatron's schedules take them.
        groups: the records of the split.
        args: Megatron's.
        config: ours.
        reading: what this rank's :class:`MicroBatches` of training are told, too.
    """
    dp_size: int = reading["dp_size"]
    order = SampleOrder(len(groups), config.noise_seed, shuffle=False)
    micro_batch_size = args.micro_batch_size
    if config.max_tokens is not None:  # the budget of training, in this order
        micro_batch_size = micro_batch_size_within_budget(
            args, groups, order, len(groups), args.global_batch_size, dp_size
        )
    num_micro_batches = args.global_batch_size // (micro_batch_size * dp_size)
    iterators = [
        MicroBatches(
            groups,
            order,
            num_samples=len(groups),
            num_micro_batches=lambda: num_micro_batches,
            micro_batch_size=micro_batch_size,
            **reading,
        )
        for _ in model  # each chunk of an interleaved pipeline reads for itself
    ]
    sums = torch.zeros(len(groups), len(groups.dimensions), 2)
    times_seen = torch.zeros(len(groups), dtype=torch.int64)
    by_id = np.argsort(groups.record_ids, kind="stable")
    progress = _Progress(groups.split, len(groups))
    for start in range(0, len(groups), args.global_batch_size):
        results = forward_only(
            model,
            iterators,
            args,
            config,
            num_micro_batches=num_micro_batches,
            micro_batch_size=micro_batch_size,
            collect=_response_sums,
        )
        for record_ids, sums_of_batch in results:
            indices = by_id[np.searchsorted(groups.record_ids, record_ids.cpu().numpy(), sorter=by_id)]
            sums[indices] = sums_of_batch.cpu()
            times_seen[indices] += 1
        progress.report(min(start + args.global_batch_size, len(groups)))
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return None
    # Each rank has its own records and zeros, so the sum is exact.
    whole, seen = (tensor.to(device.current_device()) for tensor in (sums, times_seen))
    for tensor in (whole, seen):
        dist.all_reduce(tensor, group=mpu.get_data_parallel_group())
    assert bool((seen == 1).all()), "every record must be read once"
    return whole.cpu().numpy()


def _response_sums(batch: GroupBatch, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Of a micro-batch: record ids ``[G]`` and Σ log p ``[G, D, 2]`` of the groups that count."""
    stats = response_statistics(logps, batch.lengths)
    return batch.record_ids[batch.counted], stats.sum_logps[batch.counted].float()


class _Progress:
    """Says how far the pass is, on the first rank."""

    def __init__(self, split: str, records: int):
        self.split, self.records = split, records
        self.start = self.said = time.monotonic()

    def report(self, done: int) -> None:
        now = time.monotonic()
        if done < self.records and now - self.said < _REPORT_S:
            return
        self.said = now
        rate = done / max(now - self.start, 1e-6)
        left = timedelta(seconds=round((self.records - done) / rate))
        print_rank_0(
            f"> reference log-probabilities: {done:,} of {self.records:,} {self.split} records, {rate:.1f} records/s, "
            f"{left} left"
        )
