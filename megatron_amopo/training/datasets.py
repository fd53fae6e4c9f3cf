"""Which micro-batches this rank reads: Megatron's dataset provider, and what else reads as training does."""

from collections.abc import Callable
from typing import Any

import numpy as np
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, print_rank_0

from megatron_amopo.data.batching import MicroBatches, SampleOrder
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.training.arguments import RunConfig, open_validation
from megatron_amopo.training.fp8 import token_multiple
from megatron_amopo.training.plan import describe_run
from megatron_amopo.training.reference import Reference


def reading(config: RunConfig) -> dict[str, Any]:
    """What this rank's :class:`MicroBatches` are told, whatever they are for."""
    args = get_args()
    return {
        # All context-parallel ranks of a data-parallel rank read the same micro-batches and keep a part of each.
        "dp_rank": mpu.get_data_parallel_rank(with_context_parallel=False),
        "dp_size": mpu.get_data_parallel_world_size(with_context_parallel=False),
        "noise_seed": config.noise_seed,
        "sharing": config.sharing,
        "pad_to_multiple_of": token_multiple(args),
    }


def training_batches(
    config: RunConfig, groups: PreparedGroups, reference_logps: np.ndarray | None = None
) -> MicroBatches:
    """The micro-batches of the steps from now on.

    Args:
        config: ours.
        groups: the training records.
        reference_logps: ``[len(groups), D, 2]``, for objectives that read them.
    """
    args = get_args()
    return MicroBatches(
        groups,
        SampleOrder(len(groups), config.noise_seed),
        num_samples=config.num_samples,
        num_micro_batches=get_num_microbatches,
        micro_batch_size=args.micro_batch_size,
        consumed_samples=args.consumed_train_samples,
        reference_logps=reference_logps,
        **reading(config),
    )


def datasets_provider(config: RunConfig, reference: Reference) -> Callable[..., tuple]:
    """Megatron's dataset provider. Every rank reads its own batches, hence ``is_distributed``."""

    def provide(_samples: Any, vp_stage: int | None = None) -> tuple:
        args, common = get_args(), reading(config)
        train_groups = PreparedGroups.open(config.data, "train", config.dimensions)
        train = training_batches(config, train_groups, reference.of(train_groups))
        if vp_stage in (None, 0):
            print_rank_0(describe_run(args, config, train_groups, common["dp_size"]))
        valid_groups = open_validation(config.data, config.dimensions)
        if valid_groups is None:
            return train, None, None
        eval_micro_batches = args.eval_global_batch_size // (args.eval_micro_batch_size * common["dp_size"])
        valid = MicroBatches(
            valid_groups,
            SampleOrder(len(valid_groups), config.noise_seed, shuffle=False),
            num_samples=len(valid_groups),
            num_micro_batches=lambda: eval_micro_batches,
            micro_batch_size=args.eval_micro_batch_size,
            cycle=True,
            reference_logps=reference.of(valid_groups),
            **common,
        )
        return train, valid, None

    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide
