"""The run: command line → Megatron's ``pretrain``, with our data, model, step and records put in.

    torchrun --nproc-per-node 8 -m megatron_amopo.train --amopo-data DIR --pretrained-checkpoint DIR --save DIR …

Every Megatron flag works unless it is refused by name (``checks.py``). This is the only file that knows the signatures
of Megatron's training loop, which move between minor releases.
"""

import functools
import os
import platform
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_amopo import device

device.prepare()

import torch.distributed as dist
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, print_rank_0, training
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.global_vars import (
    get_tensorboard_writer,
    get_wandb_writer,
    set_global_variables,
)

from megatron_amopo.checkpoint.import_cache import ImportFailed
from megatron_amopo.data.batching import MicroBatches, SampleOrder
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.errors import AmopoError
from megatron_amopo.model.builder import build_model
from megatron_amopo.training.arguments import RunConfig, open_validation, parse_arguments
from megatron_amopo.training.bad_steps import StoppedByBadStep
from megatron_amopo.training.checkpoint_arguments import resumed_arguments_told
from megatron_amopo.training.fp8 import token_multiple
from megatron_amopo.training.fp8_check import fp8_differences
from megatron_amopo.training.hugging_face import export_last_step
from megatron_amopo.training.ledger import LedgerFailed
from megatron_amopo.training.multipliers import Multipliers, NoMultipliers
from megatron_amopo.training.observers import Observers
from megatron_amopo.training.plan import describe_run
from megatron_amopo.training.recorder import Recorder
from megatron_amopo.training.reference import Reference
from megatron_amopo.training.reference_cache import check_named_cache, resumed_reference
from megatron_amopo.training.run_files import EVALUATION_FILE, METRICS_FILE
from megatron_amopo.training.run_record import check_resumed_run, describe_run_folder
from megatron_amopo.training.saving import SaveFailed, Saving
from megatron_amopo.training.starts import record_start
from megatron_amopo.training.step import Step
from megatron_amopo.training.stopping import LOST_RANK, Stopping, is_lost_rank
from megatron_amopo.training.together import FailedTogether


def main() -> None:
    """Train, evaluate and save as the command line says; exit code 2 and one line for an error that is the user's to
    mend, 75 where the run stopped before its last step and is to be started again.
    """
    try:
        args, config = prepare()
    except AmopoError as error:
        # All ranks of a machine find the same error; one says it, or the one that alone knows why an import failed.
        # Another machine may lack what this one has.
        if _is_first_here() or isinstance(error, ImportFailed):
            where = f" ({platform.node()})" if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 else ""
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    try:
        stopping = run(args, config)
    except (FailedTogether, NoMultipliers, SaveFailed, StoppedByBadStep, LedgerFailed) as error:
        # The last comes after a step, where none asks how the others fare: the rank that writes says it.
        if args.rank == 0 or isinstance(error, LedgerFailed):
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
    hooks = _OurHooks(config, observers, reference, multipliers, saving, stopping)
    restored = (multipliers.restore, observers.bad_steps.restore)
    with stopping, observers, saving, hooks, resumed_arguments_told(*restored):
        training.pretrain(
            container,
            _datasets_provider(config, reference),
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


def _reading(config: RunConfig) -> dict[str, Any]:
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


def _datasets_provider(config: RunConfig, reference: Reference) -> Callable[..., tuple]:
    """Megatron's dataset provider. Every rank reads its own batches, hence ``is_distributed``."""

    def provide(_samples: Any, vp_stage: int | None = None) -> tuple:
        args = get_args()
        train_groups = PreparedGroups.open(config.data, "train", config.dimensions)
        common = _reading(config)
        train = MicroBatches(
            train_groups,
            SampleOrder(len(train_groups), config.noise_seed),
            num_samples=config.num_samples,
            num_micro_batches=get_num_microbatches,
            micro_batch_size=args.micro_batch_size,
            consumed_samples=args.consumed_train_samples,
            reference_logps=reference.of(train_groups),
            **common,
        )
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


class _OurHooks:
    """Puts our records into Megatron's loop by wrapping seven of its functions for the time of a run.

    - ``setup_model_and_optimizer`` gives the starting weights, of which the reference log-probabilities are;
    - ``train_step`` is what observers are told begins and ends;
    - ``training_log`` sees every step's reduced metrics, by which multipliers ascend, but prints only values ≥ 0 and no
      rates of records and tokens;
    - ``evaluate_and_print_results`` would print a perplexity of every metric, and repeat the last evaluation;
    - ``train`` starts without an evaluation;
    - ``save_checkpoint`` writes weights; what export and resume need beside them is written once before it;
    - ``checkpoint_and_decide_exit`` says that the run ends early.
    """

    def __init__(
        self,
        config: RunConfig,
        observers: Observers,
        reference: Reference,
        multipliers: Multipliers,
        saving: Saving,
        stopping: Stopping,
    ):
        self.config, self.observers, self.reference, self.multipliers = config, observers, reference, multipliers
        self.saving, self.stopping = saving, stopping
        self.recorder: Recorder | None = None
        self.evaluated_at: int | None = None
        self.described = False

    def __enter__(self) -> None:
        ours = {
            "setup_model_and_optimizer": self._setup,
            "train_step": self._train_step,
            "training_log": self._training_log,
            "evaluate_and_print_results": self._evaluate,
            "train": self._train,
            "save_checkpoint": self._save_checkpoint,
            "checkpoint_and_decide_exit": self._decide_exit,
        }
        self.original = {name: getattr(training, name) for name in ours}
        for name, function in ours.items():
            setattr(training, name, function)

    def __exit__(self, *exc: Any) -> None:
        for name, function in self.original.items():
            setattr(training, name, function)

    def _setup(self, *rest: Any, **options: Any) -> Any:
        model, optimizer, *others = self.original["setup_model_and_optimizer"](*rest, **options)
        if optimizer is not None:  # absent where the run only evaluates
            self.observers.bad_steps.watch(optimizer)
        # As in Megatron's first step: all weights are there, none has to be gathered before it is used.
        gathered_late = training.should_disable_forward_pre_hook(get_args())
        if gathered_late:
            training.disable_forward_pre_hook(model, param_sync=False)
        self.reference.provide(model, get_args(), _reading(self.config))
        if gathered_late:
            training.enable_forward_pre_hook(model)
        self.observers.start(get_args().iteration)
        return model, optimizer, *others

    def _record(self) -> Recorder | None:
        """The recorder, on the last rank: it holds the last pipeline stage and Megatron's writers."""
        if self.recorder is None and dist.get_rank() == dist.get_world_size() - 1:
            args = get_args()
            folder = args.save or args.tensorboard_dir
            self.recorder = Recorder(
                dimensions=self.config.dimensions,
                records_per_step=args.global_batch_size,
                total_steps=args.train_iters or 0,
                log_interval=args.log_interval,
                file=Path(folder) / (EVALUATION_FILE if args.skip_train else METRICS_FILE) if folder else None,
                tensorboard=get_tensorboard_writer(),
                wandb=get_wandb_writer() or None,
            )
            if not args.skip_train:
                self.recorder.resume(args.iteration)
        return self.recorder

    def _train(
        self,
        forward_step: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        train_iterator: Any,
        valid_iterator: Any,
        process: Any,
        config: Any,
        *rest: Any,
        **options: Any,
    ) -> Any:
        args = get_args()
        self.saving.begin(args.iteration)
        self.stopping.begin()
        if args.rank == 0 and args.save:
            record_start(Path(args.save), args)
        if self.config.eval_at_start and args.do_valid and args.iteration == 0:
            self._evaluate("", forward_step, valid_iterator, model, 0, process, config)
        if recorder := self._record():
            recorder.start_clock()
        return self.original["train"](
            forward_step, model, optimizer, scheduler, train_iterator, valid_iterator, process, config, *rest, **options
        )

    def _train_step(
        self, forward_step: Any, iterator: Any, model: Any, *rest: Any, iteration: int, **options: Any
    ) -> Any:
        self._check_fp8(model, iteration + 1)
        self.observers.begin_step(iteration + 1)
        result = self.original["train_step"](forward_step, iterator, model, *rest, iteration=iteration, **options)
        self._judge(iteration + 1)
        conflict = self.observers.end_step(iteration + 1)
        if conflict is not None and (recorder := self._record()):
            recorder.conflict(iteration + 1, conflict)
        return result

    def _check_fp8(self, model: Any, step: int) -> None:
        interval = self.config.observers.fp8_check_interval
        if interval is None or step % interval:
            return
        start = time.monotonic()
        # In the first step after a start, the hooks that gather weights late aren't there yet.
        gathered_late = bool(getattr(model[0], "remove_forward_pre_hook_handles", {}))
        if gathered_late:
            training.disable_forward_pre_hook(model)
        figures = fp8_differences(model, get_args(), self.config, _reading(self.config))
        if gathered_late:
            training.enable_forward_pre_hook(model)
        if figures is not None and (recorder := self._record()):
            recorder.fp8(step, figures, time.monotonic() - start)

    def _judge(self, step: int) -> None:
        bad_steps = self.observers.bad_steps
        if bad_steps.latest is not None and (recorder := self._record()):
            recorder.bad_step(step, bad_steps.latest)
        try:
            bad_steps.check(step)
        except StoppedByBadStep:
            training.maybe_finalize_async_save(blocking=True)  # what is being saved is still good
            raise

    def _training_log(
        self, loss_dict: dict, total_loss_dict: dict, learning_rate: Any, iteration: int, *rest: Any, **options: Any
    ) -> Any:
        _loss_scale, _report_memory, skipped, grad_norm, *_ = rest
        if loss_dict and (recorder := self._record()):
            measured = {**loss_dict, **self.multipliers.metrics()} if not skipped else {}
            recorder.step(iteration, measured, learning_rate=learning_rate, grad_norm=grad_norm)
        self.multipliers.step(loss_dict, skipped=bool(skipped), grad_norm=grad_norm)
        shown = {name: value for name, value in loss_dict.items() if name == "loss"}
        return self.original["training_log"](shown, total_loss_dict, learning_rate, iteration, *rest, **options)

    def _evaluate(
        self,
        _prefix: str,
        forward_step: Any,
        iterator: Any,
        model: Any,
        iteration: int,
        _process: Any,
        config: Any,
        **options: Any,
    ) -> None:
        if self.evaluated_at == iteration:
            return
        start = time.monotonic()
        groups = {name: options.get(name) for name in ("pg_collection", "p2p_communicator")}
        metrics, _, timed_out = training.evaluate(forward_step, iterator, model, None, config, **groups)
        if timed_out:
            return
        self.evaluated_at = iteration
        leakage = self.observers.end_evaluation()
        if metrics and (recorder := self._record()):
            recorder.validation(iteration, metrics, time.monotonic() - start, leakage)

    def _save_checkpoint(self, iteration: int, *rest: Any, **options: Any) -> Any:
        if self.saving.is_saved(iteration):
            return None
        self.observers.before_checkpoint()
        if dist.get_rank() == 0 and not self.described:
            describe_run_folder(Path(get_args().save), self.config, self.reference.identity)
            self.described = True
        self.multipliers.save_into(get_args())
        self.observers.bad_steps.save_into(get_args())
        result = self.original["save_checkpoint"](iteration, *rest, **options)
        self.saving.thin_out()
        return result

    def _decide_exit(self, model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any) -> bool:
        stops = self.original["checkpoint_and_decide_exit"](model, optimizer, scheduler, iteration, *rest)
        if stops:
            self.stopping.stopped(iteration)
        return stops
