"""Runs that something happens to: what is left is usable, and what goes on is the run that was never stopped."""

import json
import signal
from pathlib import Path

import pytest

from megatron_amopo.certification.observed_run import metrics
from megatron_amopo.checkpoint.iterations import iterations, why_unusable
from megatron_amopo.data.batching import SampleOrder
from megatron_amopo.data.dataset import PreparedGroups
from tests.distributed.layout_runs import CP2, OVERLAP, PP2, VPP
from tests.support.jobs import command
from tests.support.jobs_survival import (
    command_on_a_small_disk,
    command_with_factor,
    command_with_signal,
)

TIMING = {"records_per_s", "tokens_per_s"}
STEPS, BATCH, SEED = 6, 4, 7


def flags(place, save, *extra):
    return [
        "--amopo-data", str(place.data), "--pretrained-checkpoint", str(place.mcore),
        "--save", str(save), "--load", str(save), "--micro-batch-size", "2", "--global-batch-size", str(BATCH),
        "--train-iters", str(STEPS), "--log-interval", "1", "--lr", "1e-3", "--lr-decay-style", "constant",
        "--amopo-seed", str(SEED), *extra,
    ]  # fmt: skip


def curve(save):
    """Every step's metrics without timing."""
    return [{name: value for name, value in line.items() if name not in TIMING} for line in metrics(save)]


def bad_steps(save):
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "bad_step"]


def codes(results):
    return [code for code, *_ in results]


@pytest.fixture(scope="module")
def straight(ranks, workplace, tmp_path_factory):
    """The metrics of the run that nothing happens to."""
    save = tmp_path_factory.mktemp("straight")
    assert codes(ranks.run(command, 2, flags(workplace, save, "--no-save-optim"))) == [0, 0]
    return curve(save)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_on_one_rank_saves_and_asks_to_be_started_again(ranks, workplace, tmp_path, straight, number, rank):
    own = flags(workplace, tmp_path)
    stopped = ranks.run(command_with_signal, 2, own, number, rank=rank, step=3)
    assert codes(stopped) == [75, 75]
    assert f"> stopped by {number.name} after step 3 of 6, which is saved" in stopped[0][1]
    assert (tmp_path / "requeue").read_text() == f"step 3 of 6: {number.name}\n"
    assert codes(ranks.run(command, 2, own)) == [0, 0]
    assert not (tmp_path / "requeue").exists()
    assert curve(tmp_path) == straight


def test_what_can_not_be_loaded_is_passed_over(ranks, workplace, tmp_path, straight):
    """An exit by a time limit, of which a later checkpoint is half there, and the tracker file names it."""
    own = flags(workplace, tmp_path, "--save-interval", "2")
    limited = ranks.run(command, 2, [*own, "--exit-interval", "4"])
    assert codes(limited) == [75, 75]
    assert (tmp_path / "requeue").read_text() == "step 4 of 6: a limit of its flags\n"
    data = next((tmp_path / "iter_0000004").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    said = ranks.run(command, 2, own)
    assert codes(said) == [0, 0]
    assert "names iter_0000004, which can't be loaded: __" in said[0][1]
    assert "Going on from step 2, the newest that can be loaded" in said[0][1]
    assert curve(tmp_path) == straight
    assert not any(why_unusable(tmp_path / f"iter_000000{number}") for number in (2, 4, 6))  # 4 was saved again

    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    again = ranks.run(command, 2, own)
    assert codes(again) == [0, 0]
    assert "latest_checkpointed_iteration.txt is missing or damaged. Going on from step 6" in again[0][1]
    assert "saving checkpoint" not in again[0][1]  # it has taken no step

    refused = ranks.run(command, 2, [*own, "--ckpt-step", "3"])
    assert codes(refused) == [2, 2]
    assert "--ckpt-step 3" in refused[0][2]
    assert "it does not exist; usable are: 6, 4, 2" in refused[0][2]


def test_the_newest_checkpoints_are_kept(ranks, workplace, tmp_path, straight):
    """Synchronous saves, then asynchronous ones that go on from them."""
    own = flags(workplace, tmp_path, "--save-interval", "1")
    assert codes(ranks.run(command, 2, [*own, "--amopo-keep-checkpoints", "2", "--exit-interval", "3"])) == [75, 75]
    assert iterations(tmp_path) == [3, 2]
    for name in (".iter_0000009.partial", ".iter_0000001.deleted", "iter_0000008"):  # of a run that was killed
        (tmp_path / name).mkdir()
    kept = [*own, "--amopo-keep-checkpoints", "1", "--save-retain-interval", "3", "--async-save"]
    assert codes(ranks.run(command, 2, kept)) == [0, 0]
    assert iterations(tmp_path) == [6, 3]
    assert not any(why_unusable(tmp_path / f"iter_000000{number}") for number in (6, 3))
    assert not list(tmp_path.glob(".iter*"))
    assert curve(tmp_path) == straight


def test_a_full_disk_leaves_the_checkpoint_before(ranks, workplace, tmp_path):
    own = flags(workplace, tmp_path, "--save-interval", "2")
    assert codes(ranks.run(command, 2, [*own, "--exit-interval", "2"])) == [75, 75]
    failed = ranks.run(command_on_a_small_disk, 2, own, most_bytes=2**18)
    assert codes(failed) == [2, 2]
    assert f"error: --save {tmp_path}: a checkpoint can't be written: " in failed[0][2]
    assert " GiB are free there; the newest checkpoint is iter_0000002" in failed[0][2]
    assert iterations(tmp_path) == [2]


def records_of(place: Path, step: int) -> list[int]:
    groups = PreparedGroups.open(place)
    indices, _ = SampleOrder(len(groups), SEED)(range((step - 1) * BATCH, step * BATCH))
    return [int(groups.record_ids[index]) for index in indices]


def test_a_step_that_is_not_finite_ends_the_run_or_is_left_out(ranks, workplace, tmp_path):
    """On tensor- and data-parallel ranks; the run that skips from the beginning is the one that was stopped first."""
    record = records_of(workplace.data, 4)[1]
    layout = ["--tensor-model-parallel-size", "2", "--save-interval", "3"]
    own = flags(workplace, tmp_path / "stopped", *layout)
    stopped = ranks.run(command_with_factor, 4, own, record, float("nan"))
    assert codes(stopped) == [2, 2, 2, 2]
    assert (
        f"error: step 4: the loss is not finite, of record(s) {record}. The weights are those of step 3"
        in stopped[0][2]
    )
    assert iterations(tmp_path / "stopped") == [3]

    skip = "--amopo-on-bad-step", "skip"
    assert codes(ranks.run(command_with_factor, 4, [*own, *skip], record, float("nan"))) == [0] * 4
    straight = flags(workplace, tmp_path / "skipped", *layout, *skip)
    assert codes(ranks.run(command_with_factor, 4, straight, record, float("nan"))) == [0] * 4
    assert curve(tmp_path / "stopped") == curve(tmp_path / "skipped")
    assert [line["iteration"] for line in curve(tmp_path / "skipped")] == [1, 2, 3, 5, 6]
    assert all(value == value for line in curve(tmp_path / "skipped") for value in line.values())

    (bad,) = bad_steps(tmp_path / "skipped")
    assert bad["iteration"] == 4
    assert bad["not_finite"] == [record]
    assert sorted(bad["records"]) == sorted(records_of(workplace.data, 4))


@pytest.fixture(scope="module")
def left_out(ranks, workplace, tmp_path_factory):
    """A record whose loss is no number, of the first step; and the metrics of the run that leaves the step out."""
    record = records_of(workplace.data, 1)[1]
    save = tmp_path_factory.mktemp("left_out")
    own = flags(workplace, save, "--no-save-optim", "--amopo-on-bad-step", "skip", "--clip-grad", "1e6")
    assert codes(ranks.run(command_with_factor, 1, own, record, float("nan"))) == [0]
    return record, curve(save)


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, PP2),
        (2, CP2),
        (2, ["--use-distributed-optimizer", *OVERLAP]),
        (4, [*PP2, *VPP, "--micro-batch-size", "1", "--use-distributed-optimizer", *OVERLAP]),
        (2, ["--clip-grad", "0"]),
    ],
    ids=["pp2", "cp2", "dp2-overlap", "vpp2-dp2-overlap", "unclipped"],
)
def test_a_first_step_is_left_out_under_every_layout(num_ranks, layout, ranks, workplace, tmp_path, left_out):
    """An evaluation follows it, before any step has changed the weights."""
    record, expected = left_out
    own = flags(workplace, tmp_path, "--no-save-optim", "--clip-grad", "1e6", "--eval-interval", "1", *layout)
    skip = ["--amopo-on-bad-step", "skip"]
    assert codes(ranks.run(command_with_factor, num_ranks, [*own, *skip], record, float("nan"))) == [0] * num_ranks
    (bad,) = bad_steps(tmp_path)
    assert (bad["iteration"], bad["not_finite"]) == (1, [record])
    found = curve(tmp_path)
    assert [line["iteration"] for line in found] == [2, 3, 4, 5, 6]
    for line, wanted in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    assert [line["iteration"] for line in metrics(tmp_path, "validation")] == [1, 2, 3, 4, 5, 6]


def test_a_spike_is_seen_after_a_resume_as_without_one(ranks, workplace, tmp_path):
    """Three steps make a median, of which the resumed run has seen none itself."""
    record = records_of(workplace.data, 5)[0]
    saves = {}
    for name, stops in (("straight", [[]]), ("resumed", [["--exit-interval", "4"], []])):
        saves[name] = tmp_path / name
        own = flags(workplace, saves[name], "--amopo-grad-norm-spike", "20", "--amopo-on-bad-step", "skip")
        for stop in stops:
            ranks.run(command_with_factor, 2, [*own, *stop], record, 1e3, least=3)
        (bad,) = metrics(saves[name], "bad_step")
        assert bad["iteration"] == 5
        assert bad["grad_norm"] > 20 * max(line["grad_norm"] for line in curve(saves[name]))
    assert curve(saves["resumed"]) == curve(saves["straight"])

    loss = flags(workplace, tmp_path / "loss", "--amopo-loss-spike", "20")
    ended = ranks.run(command_with_factor, 2, loss, record, 1e3, least=3)
    assert codes(ended) == [2, 2]
    assert "step 5: the loss " in ended[0][2]
    assert f"times the median of 4 steps before, over records {record}, " in ended[0][2]
