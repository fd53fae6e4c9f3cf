"""Training runs of several ranks that start in a second, so that they can be killed often.

A process start spends most of its time importing Megatron, which has nothing to do with what a killed run leaves on the
disk. So this process imports it once, computes nothing, and forks the ranks of every run: what they inherit has neither
threads nor process groups. Takes the flags of a training command; gives its ranks' phases while they run, and their
exit codes.
"""

import contextlib
import importlib
import mmap
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

RANKS = 2
_POLL_S = 0.0005
#: What a run imports when it first needs it: half of what a start would cost.
_IMPORTED_LATE = ("pandas", "tokenizers", "torch._dynamo", "torch._inductor", "torch.onnx", "multiprocessing.managers")


def import_all() -> None:
    """Import what runs need. Call it before the first run, in a process without threads."""
    for name in ("megatron_amopo.training.train", *_IMPORTED_LATE):
        importlib.import_module(name)


class Phase(IntEnum):
    """What a rank is doing."""

    START = 0  # arguments, process groups, model
    LOAD = 1  # the checkpoint
    STEP = 2
    SAVE = 3
    END = 4  # after the last step


class ForkedRun:
    """One start of a training command on :data:`RANKS` ranks, in a process group of its own."""

    def __init__(self, flags: Sequence[str], log: Path):
        self.started = time.monotonic()
        self._shared = mmap.mmap(-1, 2 * RANKS)  # a phase and how often it was entered, by rank
        port = _free_port()
        self.pids: list[int] = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                _become_rank(rank, flags, port, log, self._shared, leader=self.pids[0] if self.pids else 0)
            self.pids.append(pid)
            with contextlib.suppress(OSError):  # both do it, as neither knows who is first
                os.setpgid(pid, self.pids[0])
        self.codes: dict[int, int] = {}

    def phase(self, rank: int = 0) -> tuple[Phase, int]:
        """What a rank is doing, and the how manieth time it is (of 256)."""
        return Phase(self._shared[2 * rank]), self._shared[2 * rank + 1]

    def wait_for(self, phase: Phase, times: int) -> bool:
        """Wait until the first rank does something for the n-th time (later ones count, too); False if it ends
        before.
        """
        seen, last = 0, None
        while self.poll() < RANKS:
            now = self.phase()
            if now != last and now[0] == phase:
                seen += 1
                if seen >= times:
                    return True
            last = now
            time.sleep(_POLL_S)
        return False

    def poll(self) -> int:
        """How many ranks have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes)

    def wait(self, seconds: float) -> bool:
        """Wait until all ranks have ended; False if they haven't in time."""
        deadline = time.monotonic() + seconds
        while self.poll() < RANKS:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all at once."""
        with contextlib.suppress(ProcessLookupError):
            if rank is None:
                os.killpg(self.pids[0], number)
            else:
                os.kill(self.pids[rank], number)

    def clean_up(self) -> None:
        """End what is left of the process group."""
        self.kill()
        self.wait(60)
        self.kill()  # helpers of the ranks


def in_a_fork(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, in a process of its own: this one is to stay without threads."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send((True, work()))
        except Exception:
            theirs.send((False, traceback.format_exc()))

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        succeeded, result = ours.recv()
    except EOFError:
        succeeded, result = False, "its process ended"
    process.join()
    if not succeeded:
        raise RuntimeError(result)
    return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _become_rank(rank: int, flags: Sequence[str], port: int, log: Path, shared: mmap.mmap, leader: int) -> None:
    """Run the training command in this forked process, and end it."""
    code = 1
    try:
        os.setpgid(0, leader)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["train", *flags]
        from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

        from megatron_amopo.training.train import main

        get_write_results_queue("fork")  # spawned, it would import this program again
        with _phases(rank, shared):
            main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _phases(rank: int, shared: mmap.mmap) -> Iterator[None]:
    """Tell this rank's phases."""
    from megatron_amopo.training.hooks import Hooks

    def enter(phase: Phase) -> None:
        shared[2 * rank + 1] = (shared[2 * rank + 1] + 1) % 256
        shared[2 * rank] = phase

    def told(name: str, during: Phase, after: Phase) -> Callable[..., Any]:
        original = getattr(Hooks, name)

        def wrapped(*rest: Any, **options: Any) -> Any:
            enter(during)
            result = original(*rest, **options)
            enter(after)
            return result

        return wrapped

    hooks: Any = Hooks
    hooks._setup = told("_setup", Phase.LOAD, Phase.LOAD)
    hooks._train_step = told("_train_step", Phase.STEP, Phase.STEP)
    hooks._save_checkpoint = told("_save_checkpoint", Phase.SAVE, Phase.STEP)
    hooks._train = told("_train", Phase.STEP, Phase.END)
    yield
