"""Ranks on this machine, started once and used for many layouts.

Importing Megatron takes seconds, so on the CPU one process imports it for all ranks, which are forks of it, and the
ranks live as long as the pool. A job is a function of an importable module that runs on the first n ranks, each with
its environment set as torchrun would; what it returns on each rank comes back.
"""

import gc
import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch.multiprocessing as mp
from torch.distributed import TCPStore

JOB_TIMEOUT_S = 600
#: What the process imports of which the CPU's ranks are forks.
CPU_RANK = "megatron_amopo.certification.cpu_rank"


class RankPool:
    """``size`` processes waiting for jobs: on the CPU (gloo), or each on a GPU of its own (NCCL) with ``gpus``. A job
    that takes longer than ``timeout_s`` seconds has failed.
    """

    def __init__(self, size: int, *, gpus: bool = False, timeout_s: float = JOB_TIMEOUT_S):
        self._size, self._gpus, self._timeout_s = size, gpus, timeout_s
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn") if self._gpus else mp.get_context("forkserver")  # CUDA survives no fork
        context.set_forkserver_preload([CPU_RANK])
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, theirs, self._gpus), daemon=False)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], num_ranks: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Run ``job(*args, **kwargs)`` on the first ``num_ranks`` ranks; the results by rank. A job may initialise
        ``torch.distributed`` once: the ranks' addresses are kept as long as it runs.

        Raises:
            RuntimeError: with the traceback of the first rank that failed; all ranks are then started anew for the next
                job.
        """
        if not self._processes[0].is_alive():
            self._start()
        # Where ranks meet, as with torchrun: at a port that is held from now on, and no other program can take.
        meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        chosen = self._connections[:num_ranks]
        for connection in chosen:
            connection.send((job, args, kwargs, num_ranks, meeting.port))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout_s
        while len(results) < num_ranks:
            missing = [connection for rank, connection in enumerate(chosen) if rank not in results]
            ready = wait(missing, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise RuntimeError(
                    f"{job.__name__} did not finish on {len(missing)} of {num_ranks} ranks in {self._timeout_s:g} s"
                )
            for rank in [rank for rank, connection in enumerate(chosen) if connection in ready]:
                try:
                    ok, results[rank] = chosen[rank].recv()
                except (EOFError, ConnectionError):  # killed, or its imports failed
                    ok, results[rank] = False, "its process ended"
                if not ok:
                    # The other ranks may wait for this one for ever.
                    self.close()
                    raise RuntimeError(f"{job.__name__} failed on rank {rank} of {num_ranks}:\n{results[rank]}")
        return [results[rank] for rank in range(num_ranks)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks."""
        for connection, process in zip(self._connections, self._processes, strict=True):
            if process.is_alive():
                try:
                    connection.send(None)
                    process.join(timeout=5)
                except OSError:
                    pass
            if process.is_alive():
                process.kill()
                process.join()


def _work(rank: int, connection: Connection, gpus: bool) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    if gpus:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    else:
        import_module(CPU_RANK)  # takes no time in a fork of it
    from megatron_amopo import device

    device.prepare()
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # some containers switch TF32 on
    while (message := connection.recv()) is not None:
        job, args, kwargs, num_ranks, port = message
        os.environ.update(
            WORLD_SIZE=str(num_ranks),
            LOCAL_WORLD_SIZE=str(num_ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )
        try:
            connection.send((True, job(*args, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        # Models and Megatron's globals refer to each other; gloo's threads live as long as they do.
        gc.collect()
