"""What a run records beyond its metrics, put together: whose flag is set, and when each is told what.

Takes the run's configuration; gives the step something to report its micro-batches to, and the training loop one place
to say that a step begins, an evaluation or a step has ended, a checkpoint is about to be saved. What is recorded is the
business of ``ledger.py``, ``leakage.py``, ``conflict.py`` and ``metrics.py``.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

from megatron_amopo.checkpoint.iterations import holds_checkpoint
from megatron_amopo.data.batching import GroupBatch
from megatron_amopo.model.context_parallel import BatchPart
from megatron_amopo.objectives import AmopoLoss, Pairs
from megatron_amopo.training.arguments import RunConfig
from megatron_amopo.training.bad_steps import BadSteps
from megatron_amopo.training.conflict import ConflictMeter
from megatron_amopo.training.leakage import Leakage, LeakageMatrix
from megatron_amopo.training.ledger import Ledger, drop_after
from megatron_amopo.training.metrics import EvaluatedResponses
from megatron_amopo.training.run_files import LEDGER_FOLDER
from megatron_amopo.training.together import together


class Observer(Protocol):
    """What is told of a micro-batch on the last pipeline stage. Groups that another rank reports don't count in
    ``batch.counted``.
    """

    def add(self, batch: GroupBatch, pairs: Pairs, result: AmopoLoss) -> None: ...


class Observers:
    """Everything that a run's flags ask for. As a context it lasts as long as the run, whose last rows it writes.

    Args:
        config: of the run.
        save: the run's own folder; None without one.
    """

    def __init__(self, config: RunConfig, save: Path | None):
        flags = config.observers
        self._save, self._dump = save, config.dump_logps
        self._responses = EvaluatedResponses(config.dimensions) if config.dump_logps else None
        self._leakage = Leakage(flags.leakage_of, config.dimensions) if flags.leakage_of else None
        self._ledger = Ledger(save / LEDGER_FOLDER, config.dimensions) if flags.ledger and save else None
        self.bad_steps = BadSteps(config.survival.bad_steps)
        self._conflict = ConflictMeter(config.dimensions, flags.conflict_interval) if flags.conflict_interval else None

    def of(self, *, training: bool) -> tuple[Observer, ...]:
        """Those that a micro-batch of training or of evaluation is reported to."""
        of_training: tuple[Observer | None, ...] = (self._ledger, self.bad_steps)
        candidates = of_training if training else (self._responses, self._leakage)
        return tuple(observer for observer in candidates if observer is not None)

    def watch_rows(self, part: BatchPart) -> Callable[[Tensor], None] | None:
        """What is to be told the gradient of a training micro-batch's head rows, if anything is."""
        return self._conflict.watch(part) if self._conflict else None

    def start(self, iteration: int) -> None:
        """Go on after step ``iteration``, or begin at 0, before the first step. A collective call of all ranks.

        Raises:
            FailedTogether: the ledger's folder can't be made, or holds what can't be read or removed.
        """
        if self._save is None:
            return
        together(partial(self._start_ledger, self._save, iteration))

    def _start_ledger(self, save: Path, iteration: int) -> None:
        folder = save / LEDGER_FOLDER
        if dist.get_rank() == 0 and folder.is_dir():  # also where the ledger is off: rows must not outlive their run
            resumed = holds_checkpoint(save)
            drop_after(folder, iteration if resumed else 0)
        is_first = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0
        if self._ledger and is_first and mpu.is_pipeline_last_stage(ignore_virtual=True):
            self._ledger.open(mpu.get_data_parallel_rank(with_context_parallel=False))

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch; steps count from 1."""
        self.bad_steps.begin_step()
        if self._conflict:
            self._conflict.begin_step(step)

    def end_step(self, step: int) -> dict[str, float] | None:
        """After the last micro-batch: the conflict meter's figures on the last pipeline stage, if it measured."""
        if self._ledger:
            self._ledger.end_step(step)
        if self._conflict is None or not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return None
        return self._conflict.end_step(mpu.get_context_parallel_group(), mpu.get_data_parallel_group())

    def end_evaluation(self) -> LeakageMatrix | None:
        """After a whole evaluation: write what is to be dumped; the leakage matrix on the last pipeline stage."""
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return None
        all_data = mpu.get_data_parallel_group(with_context_parallel=True)
        if self._responses is not None and self._dump is not None:
            is_writer = mpu.get_tensor_model_parallel_rank() == 0 and all_data.rank() == 0
            self._responses.write(self._dump, mpu.get_data_parallel_group(), is_writer=is_writer)
        return self._leakage.take(all_data) if self._leakage else None

    def before_checkpoint(self) -> None:
        """A checkpoint must not exist before the rows of its steps. A collective call of all ranks.

        Raises:
            FailedTogether: rows couldn't be written.
        """
        if self._ledger:
            together(self._ledger.flush)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._ledger is None:
            return
        if error is None or isinstance(error, SystemExit):  # Megatron's way to stop early, on all ranks
            together(self._ledger.close)
        else:
            self._ledger.close(abandon=True)
