"""Runs that something happens to: what is left is usable, and what goes on is the run that was never stopped."""

import signal

import pytest

from megatron_amopo.certification.observed_run import metrics
from tests.support.jobs import command
from tests.support.jobs_survival import command_with_signal

TIMING = {"records_per_s", "tokens_per_s"}
STEPS = 6


def flags(place, save, *extra):
    return [
        "--amopo-data", str(place.data), "--pretrained-checkpoint", str(place.mcore),
        "--save", str(save), "--load", str(save), "--micro-batch-size", "2", "--global-batch-size", "4",
        "--train-iters", str(STEPS), "--log-interval", "1", "--lr", "1e-3", "--lr-decay-style", "constant", *extra,
    ]  # fmt: skip


def curve(save):
    """Every step's metrics without timing."""
    return [{name: value for name, value in line.items() if name not in TIMING} for line in metrics(save)]


@pytest.fixture(scope="module")
def straight(ranks, workplace, tmp_path_factory):
    """The metrics of the run that nothing happens to."""
    save = tmp_path_factory.mktemp("straight")
    assert [code for code, *_ in ranks.run(command, 2, flags(workplace, save, "--no-save-optim"))] == [0, 0]
    return curve(save)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_on_one_rank_saves_and_asks_for_a_requeue(ranks, workplace, tmp_path, straight, number, rank):
    own = flags(workplace, tmp_path)
    stopped = ranks.run(command_with_signal, 2, own, number, rank=rank, step=3)
    assert [code for code, *_ in stopped] == [75, 75]
    assert f"> stopped by {number.name} after step 3 of 6, which is saved" in stopped[0][1]
    assert (tmp_path / "requeue").read_text() == f"step 3 of 6: {number.name}\n"
    assert [code for code, *_ in ranks.run(command, 2, own)] == [0, 0]
    assert not (tmp_path / "requeue").exists()
    assert curve(tmp_path) == straight
