"""Our part of Megatron's training loop: what happens before, within and after its steps beyond its own work.

Takes a run's configuration and its parts; wraps functions of :mod:`megatron.training.training` for the time of the run.
With ``train.py`` the only file that knows the signatures of Megatron's training loop, which move between minor
releases.
"""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import get_args, training
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_amopo.training.arguments import RunConfig
from megatron_amopo.training.bad_steps import StoppedByBadStep
from megatron_amopo.training.datasets import reading
from megatron_amopo.training.fp8_check import fp8_differences
from megatron_amopo.training.multipliers import Multipliers
from megatron_amopo.training.observers import Observers
from megatron_amopo.training.recorder import Recorder
from megatron_amopo.training.reference import Reference
from megatron_amopo.training.run_files import EVALUATION_FILE, METRICS_FILE
from megatron_amopo.training.run_record import describe_run_folder
from megatron_amopo.training.saving import Saving
from megatron_amopo.training.starts import record_start
from megatron_amopo.training.stopping import Stopping
from megatron_amopo.training.together import together


class Hooks:
    """Puts our records into Megatron's loop by wrapping nine of its functions for the time of a run.

    - ``setup_model_and_optimizer`` gives the starting weights, of which the reference log-probabilities are;
    - ``train_step`` is what observers are told begins and ends;
    - ``training_log`` sees every step's reduced metrics, by which multipliers ascend, but prints only values ≥ 0 and no
      rates of records and tokens;
    - ``evaluate_and_print_results`` would print a perplexity of every metric, and repeat the last evaluation;
    - ``train`` starts without an evaluation;
    - ``save_checkpoint`` writes weights; what export and resume need beside them is written once before it;
    - ``checkpoint_and_decide_exit`` says that the run ends early;
    - ``enable_forward_pre_hook`` and ``disable_forward_pre_hook`` do nothing where nothing is left to do.
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
            "enable_forward_pre_hook": self._gather_late,
            "disable_forward_pre_hook": self._gather_at_once,
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
        gathered_late = is_gathered_late(model)
        self._gather_at_once(model, param_sync=False)
        self.reference.provide(model, get_args(), reading(self.config))
        if gathered_late:
            self._gather_late(model)
        self.observers.start(get_args().iteration)
        return model, optimizer, *others

    # Megatron sets the hooks that gather weights late after the first step that changed them. Its evaluation takes them
    # off and sets them again whether they are there or not: it knows no first step that was left out.
    def _gather_late(self, model: Any) -> None:
        if not is_gathered_late(model):
            self.original["enable_forward_pre_hook"](model)

    def _gather_at_once(self, model: Any, *rest: Any, **options: Any) -> None:
        if is_gathered_late(model):
            self.original["disable_forward_pre_hook"](model, *rest, **options)

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
            if args.skip_train:
                self.recorder.mend()
            else:
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
        if args.save:
            together(lambda: record_start(Path(args.save), args) if args.rank == 0 else None)
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
        gathered_late = is_gathered_late(model)
        self._gather_at_once(model)
        figures = fp8_differences(model, get_args(), self.config)
        if gathered_late:
            self._gather_late(model)
        if figures is not None and (recorder := self._record()):
            recorder.fp8(step, figures, time.monotonic() - start)

    def _judge(self, step: int) -> None:
        bad_steps = self.observers.bad_steps
        if bad_steps.latest is not None and (recorder := self._record()):
            recorder.bad_step(step, bad_steps.latest)
        try:
            bad_steps.check(step)
        except StoppedByBadStep as error:
            training.maybe_finalize_async_save(blocking=True)  # what is being saved is still good
            if get_args().save is None:
                raise
            raise StoppedByBadStep(f"{error}. In --save, {self.saving.newest}") from None

    def _training_log(
        self, loss_dict: dict, total_loss_dict: dict, learning_rate: Any, iteration: int, *rest: Any, **options: Any
    ) -> Any:
        _loss_scale, _report_memory, skipped, grad_norm, *_ = rest
        if loss_dict and (recorder := self._record()):
            measured = {**loss_dict, **self.multipliers.metrics()} if not skipped else {}
            norm = None if skipped else grad_norm  # a bad step's own line has it
            recorder.step(iteration, measured, learning_rate=learning_rate, grad_norm=norm)
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
        args = get_args()
        with self.saving.failures():
            training.maybe_finalize_async_save(blocking=True)  # one save at a time
            if not self.described:
                identity = self.reference.identity
                self.saving.on_first_rank(lambda: describe_run_folder(Path(args.save), self.config, identity))
                self.described = True
            self.multipliers.save_into(args)
            self.observers.bad_steps.save_into(args)
            self.saving.prepare(iteration)
            result = self.original["save_checkpoint"](iteration, *rest, **options)
        self.saving.thin_out()
        return result

    def _decide_exit(self, model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any) -> bool:
        stops = self.original["checkpoint_and_decide_exit"](model, optimizer, scheduler, iteration, *rest)
        if stops:
            self.stopping.stopped(iteration)
        return stops


def is_gathered_late(model: Any) -> bool:
    """Whether hooks wait for the weights of Megatron's ``model`` (``--overlap-param-gather``) at this moment."""
    return bool(getattr(model[0], "remove_forward_pre_hook_handles", {}))
