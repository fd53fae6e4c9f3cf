"""The run: command line → Megatron's ``pretrain``, with our data, model, step and records put in.

    torchrun --nproc-per-node 8 -m megatron_amopo.train --amopo-data DIR --pretrained-checkpoint DIR --save DIR …

Every Megatron flag works unless it is refused by name (``checks.py``, ``supported_flags.py``).
"""

import functools
import os
import platform
import sys
import time
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_amopo import device

device.prepare()

import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.training import get_args, training
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.global_vars import (
    set_global_variables,
)

from megatron_amopo.checkpoint.import_cache import ImportFailed
from megatron_amopo.errors import AmopoError
from megatron_amopo.model.builder import build_model
from megatron_amopo.training.arguments import RunConfig, parse_arguments
from megatron_amopo.training.bad_steps import StoppedByBadStep
from megatron_amopo.training.checkpoint_arguments import resumed_arguments_told
from megatron_amopo.training.datasets import datasets_provider
from megatron_amopo.training.hooks import Hooks
from megatron_amopo.training.hugging_face import export_last_step
from megatron_amopo.training.ledger import LedgerFailed
from megatron_amopo.training.multipliers import Multipliers, NoMultipliers
from megatron_amopo.training.observers import Observers
from megatron_amopo.training.recorder import MetricsFailed
from megatron_amopo.training.reference import Reference
from megatron_amopo.training.reference_cache import check_named_cache, resumed_reference
from megatron_amopo.training.run_record import check_resumed_run
from megatron_amopo.training.saving import SaveFailed, Saving
from megatron_amopo.training.step import Step
from megatron_amopo.training.stopping import LOST_RANK, Stopping, is_lost_rank
from megatron_amopo.training.together import FailedTogether

#: Seconds within which the first rank of a machine comes to an error that another has found.
FIRST_RANK_SPEAKS_S = 30.0


def main() -> None:
    """Train, evaluate and save as the command line says; exit code 2 and one line for an error that is the user's to
    mend, 75 where the run stopped before its last step and is to be started again.
    """
    try:
        args, config = prepare()
    except AmopoError as error:
        _say(error)
        sys.exit(2)
    try:
        stopping = run(args, config)
    except (FailedTogether, NoMultipliers, SaveFailed, StoppedByBadStep, LedgerFailed, MetricsFailed) as error:
        # The last two come after a step, where none asks how the others fare: the rank that writes says it.
        if args.rank == 0 or isinstance(error, LedgerFailed | MetricsFailed):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        print(f"error: rank {args.rank} ({platform.node()}) {LOST_RANK}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    stopping.finish()
    if config.export_hf is not None and args.rank == 0:
        try:
            export_last_step(config.export_hf, Path(args.save), args.train_iters)
        except AmopoError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)


def prepare() -> tuple[Namespace, RunConfig]:
    """Everything before the first process group: arguments, checks, and the weights where they lie in a Hugging Face
    folder.

    Raises:
        AmopoError: something can't be run.
    """
    args, config = parse_arguments()
    check_resumed_run(args, config)
    config = replace(config, reference=resumed_reference(args, config))
    check_named_cache(config)
    if config.hf_start is not None:
        config.hf_start.import_weights(quiet=not _is_first_here())
    return args, config


def _say(error: AmopoError) -> None:
    """Print an error that all ranks of a machine have found: by the first of them, or by the one that alone knows why
    an import failed. Another machine may lack what this one has.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not (_is_first_here() or isinstance(error, ImportFailed)):
        if not under_torchrun:
            return
        # It ends all ranks when one has ended, also the first, which may not have come so far. So that one ends first;
        # if it finds no error, this rank still says its own.
        time.sleep(FIRST_RANK_SPEAKS_S)
    where = f" ({platform.node()})" if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 else ""
    print(f"error{where}: {error}", file=sys.stderr, flush=True)


def _is_first_here() -> bool:
    """Whether this is the first rank of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def run(args: Namespace, config: RunConfig) -> Stopping:
    """One run of Megatron's ``pretrain`` with validated arguments; says whether it stopped before its last step."""
    args.exit_signal_handler = False  # Megatron's, in whose place comes one of more signals
    set_global_variables(args, build_tokenizer=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*recommended to use a ModelConfig.*")
        container = pretrain_cfg_container_from_args(args)
    reference = Reference(config)
    multipliers = Multipliers(config.objective.margin_floors)
    observers = Observers(config, Path(args.save) if args.save and not args.skip_train else None)
    stopping = Stopping(args)
    saving = Saving(args.save, config.survival.retention)
    hooks = Hooks(config, observers, reference, multipliers, saving, stopping)
    restored = (multipliers.restore, observers.bad_steps.restore)
    with stopping, observers, saving, hooks, resumed_arguments_told(*restored):
        training.pretrain(
            container,
            datasets_provider(config, reference),
            ModelType.encoder_or_decoder,
            Step(config, multipliers, observers),
            model_provider=functools.partial(_model_provider, config),
        )
    return stopping


def _model_provider(
    run_config: RunConfig,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Megatron's model provider: this rank's pipeline stage."""
    return build_model(
        config or core_transformer_config_from_args(get_args()),
        run_config.shape,
        pre_process=pre_process,
        post_process=post_process,
        attention=run_config.attention,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
