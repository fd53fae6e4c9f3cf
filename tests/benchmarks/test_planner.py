"""The planner beside published runs: the target is held, and the committed constants are the fitted ones."""

from __future__ import annotations

import math

import pytest

from benchmarks.planner import TARGET, calibrate, estimate
from benchmarks.published_runs import RUNS
from megatron_amopo.planning.efficiency import DEFAULT

DESCRIBED = [run for run in RUNS if run.use != "not described"]
CALIBRATION = [run for run in RUNS if run.use == "calibration"]


def error(run) -> float:
    return estimate(run, DEFAULT).total / run.step_seconds - 1


@pytest.mark.parametrize("run", DESCRIBED, ids=[f"{run}, {run.source[-8:]}" for run in DESCRIBED])
def test_within_the_target(run):
    assert abs(error(run)) <= TARGET


def test_enough_runs_of_the_list_are_described():
    listed = [run for run in RUNS if run.listed]
    configurations = {str(run) for run in listed if abs(error(run)) <= TARGET}
    assert len(configurations) >= 6
    assert any(run.use == "held out" for run in listed)
    assert all(run.why for run in RUNS if run.use == "not described")


def test_constants_are_the_fitted_ones():
    fitted = calibrate(CALIBRATION)
    assert fitted.gemm_bf16 == pytest.approx(DEFAULT.gemm_bf16, abs=0.0101)
    assert fitted.gemm_fp8 == pytest.approx(DEFAULT.gemm_fp8, abs=0.0101)


def test_a_wrong_constant_would_be_seen():
    """These runs tell the efficiency of matrix products apart by a few percent, so the target means something."""

    def loss(**changes: float) -> float:
        changed = type(DEFAULT)(**{**vars(DEFAULT), **changes})
        return sum(math.log(estimate(run, changed).total / run.step_seconds) ** 2 for run in CALIBRATION)

    assert loss(gemm_fp8=DEFAULT.gemm_fp8 * 0.8) > 3 * loss()
    assert loss(gemm_bf16=DEFAULT.gemm_bf16 * 1.25) > 3 * loss()


def test_published_figures():
    """Step times that throughputs mean, worked out by hand."""
    by_name = {f"{run}, {run.source}": run for run in RUNS}
    assert len(by_name) == len(RUNS)
    first = RUNS[0]
    assert first.step_seconds == pytest.approx(128 * 8_192 / (8 * 14_451))
    assert sum(run.count_ends for run in RUNS) == sum(run.model == "Llama 3.1 405B" for run in RUNS)
    assert all(run.dp * run.tp * run.pp * run.cp == run.gpus for run in RUNS)
    assert all(run.global_batch % (run.micro_batch * run.dp) == 0 for run in RUNS)
