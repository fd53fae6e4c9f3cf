"""Forward passes over training batches outside a training step: for reference log-probabilities, for the FP8 check.

Takes the model as Megatron's schedules do, and micro-batches; gives what a function makes of each micro-batch's
log-probabilities on the last pipeline stage. It is training's forward pass, on the same packed batches, under any
layout.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_amopo import device
from megatron_amopo.data.batching import GroupBatch
from megatron_amopo.model.builder import forward_logps
from megatron_amopo.model.context_parallel import BatchPart, gather_logps, split_batch
from megatron_amopo.training.arguments import RunConfig


def forward_only[T](
    model: Sequence[torch.nn.Module],
    iterators: Sequence[Iterator[GroupBatch]],
    args: Namespace,
    config: RunConfig,
    *,
    num_micro_batches: int,
    micro_batch_size: int,
    collect: Callable[[GroupBatch, Tensor], T],
) -> list[T]:
    """What ``collect`` makes of each micro-batch, in order; nothing on ranks that don't hold the last pipeline stage. A
    collective call of all ranks; without gradients, the model in evaluation mode meanwhile.

    Args:
        model: this rank's chunks.
        iterators: of micro-batches, one for each chunk: those of an interleaved pipeline read for themselves.
        args: Megatron's.
        config: ours.
        num_micro_batches: to take from each iterator.
        micro_batch_size: groups of a micro-batch.
        collect: is given a micro-batch on the device and its log-probabilities ``[N]``, nats.
    """
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, config, collect),
            data_iterator=list(iterators) if len(model) > 1 else iterators[0],
            model=list(model),
            num_microbatches=num_micro_batches,
            seq_length=args.seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            forward_only=True,
            collect_non_loss_data=True,
        )
    for chunk in model:
        chunk.train()
    return results


def _forward_step(
    config: RunConfig,
    collect: Callable[[GroupBatch, Tensor], Any],
    data_iterator: Iterator[GroupBatch],
    model: torch.nn.Module,
) -> tuple[Tensor, Any]:
    """Megatron's forward step."""
    cp_group = mpu.get_context_parallel_group()
    part = split_batch(next(data_iterator), rank=cp_group.rank(), size=cp_group.size()).to(device.current_device())
    own_logps = forward_logps(
        model, part.batch, vocab_size=config.vocab_size, buffer_bytes=config.head_buffer_mib * 2**20
    )
    return own_logps, partial(_collect, part, cp_group, collect)


def _collect(
    part: BatchPart,
    cp_group: dist.ProcessGroup,
    collect: Callable[[GroupBatch, Tensor], Any],
    own_logps: Tensor,
    *,
    non_loss_data: bool,
) -> Any:
    assert non_loss_data, "this step has no loss"
    return collect(part.batch, gather_logps(own_logps, part, cp_group))
