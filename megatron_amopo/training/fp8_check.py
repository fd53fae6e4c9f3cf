"""The FP8 check: how far FP8's arithmetic moves what the loss is made of.

Before every N-th step one micro-batch of that step is computed twice with the same weights and without gradients: as it
is trained, and in bf16. What is compared are log-probabilities of response tokens, and the margins made of them; a
flipped margin is a pair that FP8 has the other way round. The check is of the forward pass; gradients have their own
errors, which a loss curve beside bf16's shows.

Takes the model as it is trained, on all ranks of any layout; gives figures by name on the last pipeline stage.

Shapes: G groups of a micro-batch, D dimensions, N response tokens.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_amopo.data.batching import GroupBatch
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.objectives.statistics import response_statistics
from megatron_amopo.training.arguments import RunConfig
from megatron_amopo.training.checks import schedule_of
from megatron_amopo.training.datasets import training_batches
from megatron_amopo.training.forward_only import forward_only

Chunks = Sequence[torch.nn.Module]


@contextmanager
def without_fp8(model: Chunks) -> Iterator[None]:
    """Compute in bf16 meanwhile. Weights are kept in bf16 (``--fp8-param-gather`` is refused); whether a layer's
    products are in FP8, Megatron's block asks the configuration in every forward pass.
    """
    configs = [chunk.decoder.config for chunk in unwrap_model(list(model))]
    formats = [config.fp8 for config in configs]
    for config in configs:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8_format in zip(configs, formats, strict=True):
            config.fp8 = fp8_format


def fp8_differences(
    model: Chunks,
    args: Namespace,
    config: RunConfig,
    in_bf16: Callable[[Chunks], AbstractContextManager[None]] = without_fp8,
) -> dict[str, float] | None:
    """The figures of the micro-batch with which the next step begins, over all data-parallel ranks; None on ranks that
    don't hold the last pipeline stage. A collective call of all ranks.

    - ``logp_difference``: mean of |log p in FP8 − log p in bf16| over response tokens, nats;
    - ``logp_difference_max``: the largest, nats;
    - ``margin_difference/D``: mean of the margins' absolute difference, nats per token;
    - ``flipped/D``: fraction of records whose margin has another sign.

    Args:
        model: this rank's chunks, all their weights in place.
        args: Megatron's.
        config: ours.
        in_bf16: makes the model compute in bf16 meanwhile.
    """
    trained = _log_probabilities(model, args, config)
    with in_bf16(model):
        exact = _log_probabilities(model, args, config)
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return None
    sums, largest = _compare(trained, exact, len(config.dimensions))
    group = mpu.get_data_parallel_group(with_context_parallel=False)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total, tokens, records, *by_dimension = sums.tolist()
    margins, flips = by_dimension[: len(config.dimensions)], by_dimension[len(config.dimensions) :]
    return {
        "logp_difference": total / max(tokens, 1.0),
        "logp_difference_max": largest.item(),
        **{f"margin_difference/{n}": x / max(records, 1.0) for n, x in zip(config.dimensions, margins, strict=True)},
        **{f"flipped/{n}": x / max(records, 1.0) for n, x in zip(config.dimensions, flips, strict=True)},
    }


def _log_probabilities(model: Chunks, args: Namespace, config: RunConfig) -> list[tuple[GroupBatch, Tensor]]:
    groups = PreparedGroups.open(config.data, "train", config.dimensions)
    iterators = [training_batches(config, groups) for _ in model]
    return forward_only(
        model,
        iterators,
        args,
        config,
        num_micro_batches=schedule_of(args).together,
        micro_batch_size=args.micro_batch_size,
        collect=lambda batch, logps: (batch, logps.float()),
    )


def _compare(
    trained: Sequence[tuple[GroupBatch, Tensor]], exact: Sequence[tuple[GroupBatch, Tensor]], num_dimensions: int
) -> tuple[Tensor, Tensor]:
    """``[3 + 2 D]`` sums of token differences, tokens, records, then by dimension of margin differences and of flips;
    and the largest token difference. All float64.
    """
    device = trained[0][1].device
    sums, largest = torch.zeros(3 + 2 * num_dimensions, device=device).double(), torch.zeros((), device=device).double()
    for (batch, logps), (_, exact_logps) in zip(trained, exact, strict=True):
        if not bool(batch.counted.all()):  # it only fills a micro-batch that would be empty
            continue
        differences = (logps - exact_logps).double().abs()
        margins_GD, exact_GD = _margins(batch, logps), _margins(batch, exact_logps)
        numbers = torch.tensor([differences.sum(), len(differences), len(margins_GD)], device=device).double()
        flips_D = ((margins_GD > 0) != (exact_GD > 0)).sum(0)
        sums += torch.cat([numbers, (margins_GD - exact_GD).abs().sum(0).double(), flips_D.double()])
        largest = torch.maximum(largest, differences.max())
    return sums, largest


def _margins(batch: GroupBatch, logps: Tensor) -> Tensor:
    """``[G, D]``: c̄ − r̄, as the metric of this name."""
    means = response_statistics(logps, batch.lengths).sum_logps / batch.lengths
    return means[..., 0] - means[..., 1]
