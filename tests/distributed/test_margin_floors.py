"""Margin floors in training: the multipliers follow the logged margins, are those of one rank under every layout, and
go through checkpoints."""

import json
import shutil

import pytest
import torch

from megatron_amopo.certification.observed_run import metrics, train
from tests.distributed.layout_runs import CP2, PP2, TP2, relative_error
from tests.support.jobs import command, refusal

FLOORS, LR = {"quality_2": 0.9, "general": -0.4}, 2.0
MULTIPLIERS = [f"multiplier/{name}" for name in FLOORS]
GIVEN = ["--amopo-margin-floor", "quality_2=0.9,general=-0.4", "--amopo-margin-floor-lr", str(LR)]
TIMING = {"records_per_s", "tokens_per_s"}
STEPS = 4


def flags(place, *extra: str) -> list[str]:
    return [
        "--amopo-data", str(place.data), "--pretrained-checkpoint", str(place.mcore),
        "--micro-batch-size", "2", "--global-batch-size", "8", "--log-interval", "1", "--train-iters", str(STEPS),
        "--lr", "1e-3", "--lr-decay-style", "constant", *GIVEN, *extra,
    ]  # fmt: skip


def saving(folder) -> list[str]:
    return ["--save", str(folder), "--load", str(folder)]


@pytest.fixture(scope="module")
def floored(ranks, workplace, tmp_path_factory):
    """Evaluated before the first step and after each one."""
    folder = tmp_path_factory.mktemp("one-rank")
    own = ["--tensorboard-dir", str(folder), "--amopo-eval-at-start", "--eval-interval", "1"]
    return ranks.run(train, 1, flags(workplace, *own))[0], folder


def test_multipliers_follow_the_margins(floored):
    """From 0, max(0, λ + η·(m − margin)) step by step."""
    _, folder = floored
    expected = dict.fromkeys(FLOORS, 0.0)
    steps = metrics(folder)
    assert len(steps) == STEPS
    for step in steps:
        for name, floor in FLOORS.items():
            assert step[f"multiplier/{name}"] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
            expected[name] = max(0.0, step[f"multiplier/{name}"] + LR * (floor - step[f"margin/{name}"]))
    assert all(steps[-1][name] > 0 for name in MULTIPLIERS[:1])
    assert not any(name.startswith("multiplier/") for line in metrics(folder, "validation") for name in line)


def test_floors_pull(ranks, workplace, floored, tmp_path):
    """The first step is that of a run without floors, to the bit; the later ones go where the floor is missed: their
    loss is the objective's plus Σ λ·(m − margin), evaluation's is the objective's alone."""
    _, folder = floored
    own = ["--tensorboard-dir", str(tmp_path), "--amopo-eval-at-start", "--eval-interval", "1"]
    plain = [flag for flag in flags(workplace, *own) if flag not in GIVEN]
    ranks.run(train, 1, plain, want_tensors=False)
    with_floors, without = metrics(folder), metrics(tmp_path)
    assert {name: with_floors[0][name] for name in without[0].keys() - TIMING} == {
        name: value for name, value in without[0].items() if name not in TIMING
    }
    assert with_floors[1]["loss"] != pytest.approx(without[1]["loss"], rel=1e-3)
    term = sum(
        with_floors[1][f"multiplier/{name}"] * (floor - with_floors[1][f"margin/{name}"])
        for name, floor in FLOORS.items()
    )
    assert abs(term) > 1e-3
    assert with_floors[1]["loss"] - term == pytest.approx(without[1]["loss"], rel=1e-5)
    # After the first step: the same weights, and the multipliers of `term`.
    evaluated, plainly = metrics(folder, "validation")[1], metrics(tmp_path, "validation")[1]
    assert {name: evaluated[name] for name in plainly} == plainly
    assert with_floors[-1]["margin/quality_2"] > without[-1]["margin/quality_2"]


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, ["--micro-batch-size", "1", "--use-distributed-optimizer"]),
        (4, TP2 + PP2),
        (4, [*CP2, *PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    ],
    ids=["dp2-distopt", "tp2-pp2", "cp2-pp2-vpp2"],
)
def test_a_layout_equals_one_rank(ranks, workplace, floored, tmp_path, num_ranks, layout):
    reference, folder = floored
    moved = ranks.run(train, num_ranks, flags(workplace, "--tensorboard-dir", str(tmp_path), *layout))[0]
    assert relative_error(moved.gradients, reference.gradients) <= 1e-5
    for step, expected in zip(metrics(tmp_path), metrics(folder), strict=True):
        for name in ("loss", "margin/general", *MULTIPLIERS):
            assert step[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_resume_is_the_run_that_was_never_stopped(ranks, workplace, floored, tmp_path):
    """Bitwise, though one of the two was evaluated after every step; under another layout to rounding."""
    straight, folder = floored
    stopped, moved = tmp_path / "stopped", tmp_path / "moved"
    ranks.run(train, 1, flags(workplace, *saving(stopped), "--exit-interval", "2"), want_tensors=False)
    shutil.copytree(stopped, moved)
    resumed = ranks.run(train, 1, flags(workplace, *saving(stopped)))[0]
    assert all(torch.equal(resumed.weights[name], straight.weights[name]) for name in straight.weights)
    lines = [
        [{name: value for name, value in step.items() if name not in TIMING} for step in metrics(each)]
        for each in (stopped, folder)
    ]
    assert lines[0] == lines[1]

    ranks.run(train, 2, flags(workplace, *saving(moved), *TP2), want_tensors=False)
    for step, expected in zip(metrics(moved), metrics(folder), strict=True):
        for name in ("loss", *MULTIPLIERS):
            assert step[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name

    # Another run's floors aren't this one's.
    own = [*saving(moved), "--amopo-margin-floor", "general=0.1"]
    (message,) = ranks.run(refusal, 1, flags(workplace, *own))
    assert "holds a run with another --amopo-margin-floor" in message
    assert json.loads((moved / "run.json").read_text())["--amopo-margin-floor"] == FLOORS


def test_a_checkpoint_without_multipliers_is_refused(ranks, workplace, tmp_path):
    """Though run.json, by which a start is refused before anything is loaded, is gone."""
    own = saving(tmp_path)
    plain = [flag for flag in flags(workplace, *own, "--train-iters", "1") if flag not in GIVEN]
    ranks.run(train, 1, plain, want_tensors=False)
    (tmp_path / "run.json").unlink()
    (code, _, errors) = ranks.run(command, 1, flags(workplace, *own))[0]
    assert code == 2
    assert (
        "error: --load: the checkpoint was saved by a run without --amopo-margin-floor of general, quality_2" in errors
    )


def test_steps_that_are_skipped_leave_multipliers_alone(ranks):
    assert ranks.run(ascents, 2) == [[0.0, 0.5, 0.5, 0.5, 0.5, 1.0]] * 2


def ascents() -> list[float]:
    """λ before and after steps that count, are skipped, or aren't finite. Only the last rank is told margins."""
    import torch.distributed as dist

    from megatron_amopo.objectives import MarginFloors
    from megatron_amopo.training.multipliers import Multipliers

    dist.init_process_group("gloo")
    try:
        multipliers = Multipliers(MarginFloors.of({"a": 0.75}, ("a",), lr=1.0))
        seen = []
        for margin, skipped, grad_norm in (
            (0.25, False, None),
            (0.25, True, 1.0),
            (0.25, False, float("nan")),
            (float("nan"), False, 1.0),
            (0.25, False, 1.0),
        ):
            seen.append(multipliers.values.item())
            told = {"margin/a": torch.tensor(margin)} if dist.get_rank() == 1 else {}
            multipliers.step(told, skipped=skipped, grad_norm=grad_norm)
        return [*seen, multipliers.values.item()]
    finally:
        dist.destroy_process_group()
