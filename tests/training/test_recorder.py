"""The recorder: means over an interval, rates without the time of evaluations, files, writers, and a resumed run's
lines.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_amopo.training import recorder as recorder_module
from megatron_amopo.training.leakage import LeakageMatrix
from megatron_amopo.training.recorder import MetricsFailed, Recorder

DIMENSIONS = ("general", "correctness")


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars[tag, global_step] = scalar_value

    def log(self, data, step):
        self.scalars.update({(tag, step): value for tag, value in data.items()})


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(recorder_module, "time", clock)
    return clock


def metrics(loss, tokens=50.0):
    kinds = ("loss", "margin", "accuracy", "weight", "prob_mean", "prob_std", "logps_chosen", "logps_rejected")
    values = {f"{kind}/{name}": torch.tensor(-0.25) for kind in kinds for name in DIMENSIONS}
    return {"loss": torch.tensor(loss), "tokens_per_record": torch.tensor(tokens), **values}


def make(folder, clock, **options):
    file = folder / "metrics.jsonl" if folder else None
    recorder = Recorder(DIMENSIONS, records_per_step=8, total_steps=6, log_interval=2, file=file, **options)
    recorder._interval_start = clock.now
    return recorder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_means_and_rates_over_the_interval(tmp_path, clock, capsys):
    recorder = make(tmp_path, clock)
    clock.now += 3
    recorder.step(1, metrics(2.0), learning_rate=1e-3, grad_norm=0.5)
    recorder.validation(1, metrics(9.0), seconds=4.0)
    clock.now += 4 + 5  # the evaluation's four seconds don't count
    recorder.step(2, metrics(1.0, tokens=150.0), learning_rate=2e-3, grad_norm=0.25)
    validation, train = lines(tmp_path)
    assert (validation["split"], validation["iteration"], validation["metrics"]["loss"]) == ("validation", 1, 9.0)
    assert train["iteration"] == 2
    assert train["metrics"]["loss"] == 1.5
    assert train["metrics"]["records_per_s"] == pytest.approx(2 * 8 / 8)
    assert train["metrics"]["tokens_per_s"] == pytest.approx(2 * 100)
    assert train["metrics"]["learning_rate"] == 2e-3
    printed = capsys.readouterr().out
    assert "step 2/6 | loss 1.5000 nats | 2.0 records/s, 200 tokens/s | 0:00:16 left" in printed
    assert "general -0.250 correctness -0.250" in printed


def test_an_evaluation_before_the_start_does_not_count(tmp_path, clock):
    recorder = make(tmp_path, clock)
    recorder.validation(0, metrics(3.0), seconds=50.0)
    clock.now += 50
    recorder.start_clock()
    for step in (1, 2):
        clock.now += 2
        recorder.step(step, metrics(1.0), learning_rate=None, grad_norm=None)
    assert lines(tmp_path)[-1]["metrics"]["records_per_s"] == pytest.approx(4.0)


def test_writers_get_negative_values_too(tmp_path, clock):
    board, wandb = Writer(), Writer()
    recorder = make(None, clock, tensorboard=board, wandb=wandb)
    clock.now += 1
    recorder.validation(3, metrics(1.0), seconds=1.0)
    for writer in (board, wandb):
        assert writer.scalars["amopo-validation/margin/general", 3] == -0.25
    assert not list(tmp_path.iterdir())


def test_the_last_step_is_always_written(tmp_path, clock):
    recorder = Recorder(DIMENSIONS, records_per_step=8, total_steps=3, log_interval=2, file=tmp_path / "metrics.jsonl")
    recorder._interval_start = clock.now
    for step in (1, 2, 3):
        clock.now += 1
        recorder.step(step, metrics(float(step)), learning_rate=None, grad_norm=None)
    assert [(line["iteration"], line["metrics"]["loss"]) for line in lines(tmp_path)] == [(2, 1.5), (3, 3.0)]


def test_a_resumed_run_drops_what_lies_ahead_of_it(tmp_path, clock):
    recorder = make(tmp_path, clock)
    for step in (1, 2, 3, 4):
        clock.now += 1
        recorder.step(step, metrics(1.0), learning_rate=None, grad_norm=None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "split": "tra')  # killed while writing
    recorder = make(tmp_path, clock)
    recorder.resume(3)
    assert [line["iteration"] for line in lines(tmp_path)] == [2]

    recorder.validation(3, metrics(1.0), seconds=1.0)
    again = make(tmp_path, clock)
    again.resume(3)
    again.validation(3, metrics(1.0), seconds=1.0)  # a finished run, started once more
    assert [(line["iteration"], line["split"]) for line in lines(tmp_path)] == [(2, "train"), (3, "validation")]


def test_a_new_run_starts_a_new_file(tmp_path, clock):
    """Lines of a run that never saved a checkpoint are not this run's."""
    make(tmp_path, clock).validation(0, metrics(9.0), seconds=1.0)
    make(tmp_path, clock).resume(0)
    assert lines(tmp_path) == []


@pytest.mark.parametrize(("left", "kept"), [('{"a": 1}\n{"a": 2}\n{"a"', 2), ('{"a": 1}\n', 1), ('{"a"', 0), ("", 0)])
def test_half_a_line_is_cut_off_and_nothing_else(tmp_path, clock, left, kept):
    (tmp_path / "metrics.jsonl").write_text(left)
    recorder = make(tmp_path, clock)
    recorder.mend()
    recorder.validation(0, metrics(1.0), 0.5)
    found = lines(tmp_path)
    assert found[:-1] == [{"a": 1}, {"a": 2}][:kept]
    assert found[-1]["split"] == "validation"


def test_names_are_no_markup(tmp_path, clock, capsys):
    name = "[bold]harmless[/] :smile:"
    values = {key.replace("general", name): value for key, value in metrics(1.0).items()}
    recorder = Recorder((name, "correctness"), records_per_step=8, total_steps=6, log_interval=2, file=None)
    recorder.validation(2, values, 0.5)
    assert name in capsys.readouterr().out


def test_conflict_is_a_split_of_its_own(tmp_path, clock, capsys):
    """Few steps have it, and the means of an interval are of metrics that all steps have."""
    board = Writer()
    recorder = make(tmp_path, clock, tensorboard=board)
    clock.now += 1
    recorder.step(1, metrics(1.0), learning_rate=None, grad_norm=None)
    recorder.conflict(2, {"batch_cosine/general/correctness": -0.125, "gradient_norm/general": 0.5})
    recorder.step(2, metrics(3.0), learning_rate=None, grad_norm=None)
    conflict, train = lines(tmp_path)
    assert (conflict["split"], conflict["iteration"]) == ("conflict", 2)
    assert conflict["metrics"] == {"batch_cosine/general/correctness": -0.125, "gradient_norm/general": 0.5}
    assert train["metrics"]["loss"] == 2.0
    assert board.scalars["amopo-conflict/batch_cosine/general/correctness", 2] == -0.125
    assert "step 2/6 | gradient cosines: general/correctness -0.125" in capsys.readouterr().out


def test_leakage_goes_with_the_validation(tmp_path, clock, capsys):
    recorder = make(tmp_path, clock)
    matrix = LeakageMatrix(("correctness",), DIMENSIONS, ((-0.5, 1.25),), ((0.25, 0.75),), (1200,))
    recorder.validation(3, metrics(1.0), 1.0, matrix)
    (line,) = lines(tmp_path)
    assert {name: value for name, value in line["metrics"].items() if name.startswith("leakage")} == {
        "leakage_records/correctness": 1200,
        "leakage_margin/correctness/general": -0.5,
        "leakage_margin/correctness/correctness": 1.25,
        "leakage_accuracy/correctness/general": 0.25,
        "leakage_accuracy/correctness/correctness": 0.75,
    }
    (row,) = [text for text in capsys.readouterr().out.splitlines() if "1,200" in text]
    assert "correctness (1,200)" in row
    assert "-0.5000 (25.0)" in row
    assert "+1.2500 (75.0)" in row


def test_a_step_that_was_left_out_counts_in_no_mean(tmp_path, clock, capsys):
    """It has a line of its own; the interval that it ends is written with what it has."""
    recorder = make(tmp_path, clock)
    clock.now += 8
    bad = SimpleNamespace(
        reason="the loss is not finite",
        loss=float("inf"),
        grad_norm=3.0,
        suspects=[7],
        records={7: float("inf"), 9: 1.0},
        message=lambda step: f"step {step}: the loss is not finite, of record(s) 7",
    )
    recorder.step(1, metrics(2.0), learning_rate=1e-3, grad_norm=0.5)
    recorder.bad_step(2, bad)
    recorder.step(2, {}, learning_rate=1e-3, grad_norm=3.0)
    left_out, train = lines(tmp_path)
    assert (left_out["split"], left_out["iteration"], left_out["reason"]) == ("bad_step", 2, "the loss is not finite")
    assert (left_out["not_finite"], left_out["records"]) == ([7], [7, 9])
    assert train["metrics"]["loss"] == 2.0
    assert train["metrics"]["records_per_s"] == pytest.approx(1)
    assert "> step 2: the loss is not finite, of record(s) 7; the weights stay as they were" in capsys.readouterr().out

    recorder.step(3, {}, learning_rate=1e-3, grad_norm=3.0)
    recorder.step(4, {}, learning_rate=1e-3, grad_norm=3.0)  # nothing to say
    assert len(lines(tmp_path)) == 2


def test_what_is_not_finite_is_null(tmp_path, clock):
    """NaN isn't JSON, and other readers than Python's refuse it."""
    clock.now += 1
    make(tmp_path, clock).conflict(2, {"batch_cosine/a": float("nan"), "gradient_norm/a": float("inf"), "b": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["metrics"] == {"batch_cosine/a": None, "gradient_norm/a": None, "b": 1.0}


def test_a_full_disk_is_one_line(tmp_path, clock, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    recorder = make(tmp_path, clock)
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(MetricsFailed, match=r"metrics.jsonl can't be written: No space left on device"):
        recorder.conflict(2, {"gradient_norm/a": 1.0})
