"""Stopping before the last step, on request: after the step that is running, with a checkpoint, on all ranks alike.

Takes SIGTERM and SIGUSR1 (what schedulers send ahead of the end) on any rank; gives Megatron's loop, which asks after
every step, the answer that all ranks share, and the exit code by which a launcher knows that the run is to be started
again. ``--exit-duration-in-mins`` and ``--exit-interval`` end a run the same way.
"""

import signal
import sys
from argparse import Namespace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import global_vars
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_amopo import device
from megatron_amopo.files import write_whole
from megatron_amopo.training.run_files import REQUEUE_FILE
from megatron_amopo.training.together import together

#: Exit code of a run that stopped before its last step with all its state saved: the same command goes on. It is
#: EX_TEMPFAIL of sysexits.h, "try again later".
REQUEUE = 75
#: What is said where another rank ended in the middle of something common.
LOST_RANK = "lost another rank, which ended or hangs; its own message, or the launcher's report, says why"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals(DistributedSignalHandler):
    """Megatron's handler, for several signals: it remembers them, and ranks agree in one collective."""

    def __init__(self) -> None:
        super().__init__()
        self._received = 0  # a signal's number

    def __enter__(self) -> "StopSignals":
        self.released = False
        self._originals = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received = number

    def signals_received(self) -> list[bool]:
        """Whether any rank has received one, the same on all. A collective call of all ranks."""
        agreed = torch.tensor(self._received, device=device.current_device())
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        self._received = int(agreed)
        return [bool(self._received)]

    @property
    def name(self) -> str | None:
        """Of the signal that ended the run, if one did."""
        return signal.Signals(self._received).name if self._received else None

    def release(self) -> bool:
        """Let signals do what they did before."""
        if self.released:
            return False
        for number, handler in self._originals.items():
            signal.signal(number, handler)
        self.released = True
        return True


class Stopping:
    """Whether a run stopped before its last step. As a context it lasts as long as the run.

    Args:
        args: validated; where nothing is saved, signals end the run as they end any process.
    """

    def __init__(self, args: Namespace):
        self._args = args
        self._signals = StopSignals() if args.save and not args.skip_train else None
        self.step: int | None = None

    def __enter__(self) -> "Stopping":
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, *__: Any) -> bool:
        """The run is over. Megatron's way to stop early is an exit without a code; so is its way to end where something
        can't be loaded, which stays an error.
        """
        if self._signals is not None and self._args.exit_signal_handler:
            self._signals.release()
        if not isinstance(error, SystemExit) or error.code:
            return False
        if self.step is None:
            print(
                f"error: rank {self._args.rank}: Megatron ended the run, as it says above", file=sys.stderr, flush=True
            )
            sys.exit(1)
        return True

    def begin(self) -> None:
        """The run begins to train: from now on signals wait for the end of a step, as there is something to save; and
        what an earlier start said no longer holds.
        """
        if self._signals is None:
            return
        self._args.exit_signal_handler = True
        global_vars._GLOBAL_SIGNAL_HANDLER = self._signals.__enter__()
        together(self._forget)

    def _forget(self) -> None:
        if self._args.rank == 0:
            (Path(self._args.save) / REQUEUE_FILE).unlink(missing_ok=True)

    def stopped(self, step: int) -> None:
        """Megatron's loop ends after this step, before the last or in place of what would follow it."""
        self.step = step

    def finish(self) -> None:
        """End the process if the run stopped, when its process groups are gone."""
        if self.step is None or self._signals is None:
            return
        if self._args.rank == 0:
            why = self._signals.name or "a limit of its flags"
            file = Path(self._args.save) / REQUEUE_FILE
            try:
                write_whole(file, f"step {self.step} of {self._args.train_iters}: {why}\n")
            except OSError as error:  # the checkpoint is there all the same
                print(f"> {file} can't be written: {error}", file=sys.stderr, flush=True)
            print(
                f"> stopped by {why} after step {self.step} of {self._args.train_iters}, which is saved. The same "
                f"command goes on from there (exit code {REQUEUE})",
                flush=True,
            )
        sys.exit(REQUEUE)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error says that other ranks are gone. gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
