"""A job under torchrun, one of whose ranks is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.layout_runs import SGD

ROOT = Path(__file__).resolve().parents[2]
START_S, END_S = 300, 60


def test_a_rank_that_dies_takes_the_job_down(workplace, tmp_path):
    """In seconds, with a message of the survivor's and the launcher's report."""
    flags = [
        "--amopo-data", str(workplace.data), "--pretrained-checkpoint", str(workplace.mcore), "--save", str(tmp_path),
        "--micro-batch-size", "1", "--global-batch-size", "8", "--train-iters", "100000", "--log-interval", "1", *SGD,
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "stderr").open("w") as errors:
        job = subprocess.Popen(
            [*launcher, "-m", "megatron_amopo.train", *flags],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
        )
    try:
        wait_for_a_step(job, tmp_path)
        psutil.Process(job.pid).children()[-1].kill()
        assert job.wait(END_S) == 1
    finally:
        for process in [*psutil.Process(job.pid).children(recursive=True), job] if job.poll() is None else []:
            process.kill()
    said = (tmp_path / "stderr").read_text()
    assert "lost another rank, which ended or hangs" in said
    assert "Signal 9 (SIGKILL)" in said


def wait_for_a_step(job, folder):
    deadline = time.monotonic() + START_S
    while not (folder / "metrics.jsonl").exists():
        if job.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"no step was made:\n{(folder / 'stderr').read_text()[-3000:]}")
        time.sleep(0.2)
