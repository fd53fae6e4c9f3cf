"""The study: its arms can be trained, its data conflicts, its statistics are the known ones, it goes on where it
stopped, and its report says what the runs say.
"""

import itertools
import json
import os
import re

import numpy as np
import pytest

from benchmarks.efficacy import schedule
from benchmarks.efficacy.__main__ import main
from benchmarks.efficacy.accounting import cost_of
from benchmarks.efficacy.arms import (
    AMOPO,
    ARMS,
    ARROWS,
    BY_NAME,
    DATA,
    PAIRS_PER_STEP,
    SEEDS,
    SIMPO,
    SIZES,
    START,
    STEPS,
    TUNING_SEED,
    Arrow,
    grid,
)
from benchmarks.efficacy.outcomes import ARM_NAMES, Outcomes, Study, verdicts
from benchmarks.efficacy.report import _further, write_report
from benchmarks.efficacy.runs import chosen_setting, digits, from_digits, keep, run_file, settings, tuning_file
from benchmarks.efficacy.schedule import Job, Seconds, all_jobs, claim_folder, work
from benchmarks.efficacy.statistics import estimate, holm, hypervolume
from benchmarks.efficacy.task import DIMENSIONS, Request, conflict, generate, score
from megatron_amopo.certification.tiny import make_data, tiny_config
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.errors import ConfigError
from megatron_amopo.objectives import PAIRWISE_LOSSES, choose_objective

REQUEST = Request("capitals", ("Brazil", "Italy", "India", "Canada"), "Name the capitals of …")


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ("", (1, 1, 1)),
        ("Brasilia, Rome, Delhi, Ottawa.", (1, 5, 5)),
        ("Hello! Rio, Rome. Tip: say them aloud.", (3, 2, 5)),
        # Only the first four list words count.
        ("Rio, Milan, Mumbai, Toronto, Brasilia, Rome.", (1, 1, 5)),
        (
            "Hi! Here are the capitals: Brasilia, Rome, Delhi, Ottawa. Tip: note them daily. Ask me for more.",
            (5, 5, 3),
        ),
    ],
)
def test_rules(answer, scores):
    assert tuple(score(REQUEST, answer).values()) == scores


def test_data_conflicts_and_parts_are_apart():
    data = generate(3, lessons=30, records=200, tuning=20, test=20)
    assert vars(generate(3, lessons=30, records=200, tuning=20, test=20)) == vars(data)
    for record in data.records:
        totals = [sum(record[side]["scores"].values()) for side in ("chosen", "rejected")]
        assert totals[0] > totals[1]
    for lesson in data.lessons:
        assert lesson["chosen"]["scores"] == lesson["rejected"]["scores"]
        assert lesson["chosen"]["content"] != lesson["rejected"]["content"]
    # Helpfulness and brevity pull apart: each is the loser of many records.
    shares = conflict(data.records)
    assert shares["helpfulness"] > 0.2
    assert shares["brevity"] > 0.2

    def asked(requests):
        return {frozenset(request.items) for request in requests}

    for left, right in itertools.combinations([asked(data.tuning), asked(data.test)], 2):
        assert not left & right
    questions = {record["prompt"] for record in (*data.records, *data.lessons)}
    assert len(questions) == 230
    for request in (*data.tuning, *data.test):
        assert request.text not in questions


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_setting_of_an_arm_is_an_objective(arm):
    from argparse import ArgumentParser

    from megatron_amopo.training.objective_arguments import add_objective_arguments, read_objective

    parser = ArgumentParser()
    add_objective_arguments(parser)
    tuned = BY_NAME[arm.tunes_as]
    assert tuned.tunes_as == tuned.name
    assert arm.pairwise == tuned.pairwise, "it would take another loss's hyperparameters"
    for setting, seed in itertools.product(grid(tuned), SEEDS[:3]):
        given, _ = parser.parse_known_args(arm.flags(seed, setting))
        dimensions = arm.dimensions(seed)
        objective = read_objective(given, dimensions, DIMENSIONS)
        assert objective.flags["--amopo-pairwise"] == arm.pairwise
        assert len(set(dimensions)) == arm.prompts


def test_first_hyperparameters_are_the_published():
    for name, (published, *_) in {arm.pairwise: grid(arm)[:1] for arm in ARMS}.items():
        published = dict(published.hyperparameters)
        read = {key: value for key, value in PAIRWISE_LOSSES[name].defaults.items() if key in published}
        assert published == read


def test_arms_read_the_same_number_of_pairs():
    for arm in ARMS:
        assert arm.records_per_step * arm.prompts == PAIRS_PER_STEP
        assert arm.data in DATA
    assert len(SEEDS) % len(DIMENSIONS) == 0
    assert TUNING_SEED not in SEEDS
    left_out = [set(DIMENSIONS) - set(BY_NAME["three"].dimensions(seed)) for seed in SEEDS]
    assert all(left_out.count({name}) == len(SEEDS) // 3 for name in DIMENSIONS)
    assert choose_objective(BY_NAME[AMOPO].dimensions(0)).flags["--amopo-weighting"] == "gaussian"


def test_cost_is_what_is_read(tmp_path):
    make_data(tmp_path / "data", dimensions=3, train=10, validation=0)
    groups = PreparedGroups.open(tmp_path / "data")
    config = tiny_config().to_dict()
    cost = cost_of(groups, steps=5, records_per_step=4, seed=1, config=config, reference=True)
    assert (cost.records, cost.distinct_records, cost.pairs) == (20, 10, 60)
    assert cost.tokens == 2 * groups.packed_tokens("tree").sum()  # two epochs
    one_epoch = cost_of(groups, steps=5, records_per_step=2, seed=1, config=config, reference=False)
    assert cost.flops == pytest.approx(2 * one_epoch.flops)
    assert one_epoch.reference_flops == 0
    # A forward pass is a third of a step, less the logits that a backward pass computes again.
    assert cost.reference_flops == pytest.approx(one_epoch.flops / 3, rel=0.1)


def test_estimate():
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.number) == (3.0, 5)
    assert (found.low, found.high) == pytest.approx((1.0368, 4.9632), abs=1e-4)
    assert found.p == pytest.approx(0.013236, abs=1e-5)
    single = estimate([2.0])
    assert single.mean == 2.0
    assert np.isnan(single.low)
    assert estimate([0.0, 0.0]).p == 1.0


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_hypervolume():
    assert hypervolume(np.array([[0.5, 0.5, 0.5]])) == pytest.approx(0.125)
    assert hypervolume(np.array([[1.0, 0.5], [0.5, 1.0], [0.5, 0.5]])) == pytest.approx(0.75)
    assert hypervolume(np.array([[0.0, 1.0]])) == 0.0
    points = np.random.default_rng(0).random((5, 3))
    drawn = np.random.default_rng(1).random((200_000, 1, 3))
    assert hypervolume(points) == pytest.approx((drawn <= points).all(-1).any(-1).mean(), abs=0.005)


def test_scores_survive_the_file():
    scores = np.random.default_rng(0).integers(1, 6, (3, 5, 4, 3)).astype(np.int8)
    assert np.array_equal(from_digits(json.loads(json.dumps(digits(scores)))), scores)


def test_the_best_setting_is_chosen_and_taken_over(tmp_path):
    amopo, small, large = BY_NAME[AMOPO], *(size.name for size in SIZES)
    for number, setting in enumerate(grid(amopo)):
        facts = {**vars(setting), "mean": 3.0 + (number == 4)}
        keep(tuning_file(tmp_path, small, AMOPO, number), facts)
    best = grid(amopo)[4]
    assert chosen_setting(tmp_path, small, amopo) == best
    assert chosen_setting(tmp_path, small, BY_NAME["plain"]) == best
    assert {each.hyperparameters["beta"] for each in settings(tmp_path, large, amopo)} == {best.hyperparameters["beta"]}


class OneProcess:
    """Stands for a rank pool: runs jobs where it is."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, job, _ranks, *arguments):
        job(*arguments)


def test_a_tuning_file_of_another_setting_is_noticed(tmp_path):
    small, amopo = SIZES[0].name, BY_NAME[AMOPO]
    for number, setting in enumerate(grid(amopo)):
        facts = {**vars(setting), "learning_rate": 0.1, "mean": 3.0}
        keep(tuning_file(tmp_path, small, AMOPO, number), facts)
    with pytest.raises(AssertionError, match=r"small-amopo-0\.json is of lr0\.1-beta"):
        chosen_setting(tmp_path, small, amopo)


def test_arms_of_a_claim_are_tuned_themselves():
    for arrow in ARROWS:
        assert {BY_NAME[name].setting_of for name in (arrow.better, arrow.worse)} == {None}


def _touch(path, fail=False):
    if fail:
        raise RuntimeError("broken")
    path.touch()


def _jobs(folder, count):
    """Each needs the one before."""
    paths = [folder / str(number) for number in range(count)]
    return [
        Job(("run", "small"), path, tuple(paths[max(0, number - 1) : number]), _touch, (path,))
        for number, path in enumerate(paths)
    ]


def test_finished_jobs_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "RankPool", OneProcess)
    monkeypatch.setattr(Seconds, "measured", classmethod(lambda cls, jobs: cls()))
    jobs = _jobs(tmp_path, 5)
    jobs[0].makes.touch()
    os.utime(jobs[0].makes, (0, 0))
    # No time at all: each worker still starts one, of which only one is ready.
    progress = work(jobs, workers=1, minutes=0)
    assert (progress.finished, progress.left) == (2, 3)
    assert progress.seconds_left == pytest.approx(3 * Seconds().of(("run", "small")), abs=100)
    assert work(jobs, workers=2, minutes=None).done
    assert jobs[0].makes.stat().st_mtime == 0
    assert all(job.makes.exists() for job in jobs)


def test_a_failed_job_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "RankPool", OneProcess)
    job = Job(("run", "small"), tmp_path / "x", (), _touch, (tmp_path / "x", True))
    with pytest.raises(RuntimeError, match="run small x failed: broken"):
        work([job], workers=1, minutes=None)


def test_jobs_come_after_what_they_need(tmp_path):
    made = set()
    for job in all_jobs(tmp_path):
        assert set(job.needs) <= made, job.makes
        made.add(job.makes)
    assert {run_file(tmp_path, size.name, arm, seed) for size in SIZES for arm in ARM_NAMES for seed in SEEDS} <= made


def test_another_studys_folder_is_refused(tmp_path, monkeypatch):
    claim_folder(tmp_path)
    claim_folder(tmp_path)
    monkeypatch.setattr("benchmarks.efficacy.arms.STEPS", STEPS + 1)
    with pytest.raises(ConfigError, match="another study"):
        claim_folder(tmp_path)


def test_seeds_belong_to_the_study(tmp_path, monkeypatch):
    """More of them, when the verdicts aren't liked, would make another one."""
    claim_folder(tmp_path)
    monkeypatch.setattr("benchmarks.efficacy.arms.SEEDS", (*SEEDS, 99))
    with pytest.raises(ConfigError, match="another study"):
        claim_folder(tmp_path)


def test_a_folder_of_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for further in ([], ["--report-only"]):
        with pytest.raises(SystemExit, match="2"):
            main(["--output", str(tmp_path), *further])
    errors = capsys.readouterr().err
    assert "holds other files, and no study" in errors
    assert "--report-only: there is no study at" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def _write_runs(output, seeds, sizes, lifts, names=ARM_NAMES):
    """Runs whose scores are noise, by so many points higher for an arm."""
    for size, arm, seed in itertools.product(sizes, names, seeds):
        draw = np.random.default_rng([seed, *map(ord, arm)])
        level = 2.5 + lifts.get(arm, 0.0)

        def scores(*shape, draw=draw, level=level):
            return np.clip(np.round(draw.normal(level, 0.7, shape)), 1, 5).astype(np.int8)

        facts = {
            "arm": arm,
            "size": size,
            "seed": seed,
            "general": digits(scores(300, 3)),
            "asked": digits(scores(3, 5, 10, 3)),
            "examples": ["…"],
            "seconds": 20.0,
            "code": "abcdef",
        }
        if arm != START:
            setting = grid(BY_NAME[BY_NAME[arm].tunes_as])[0]
            facts |= {
                "learning_rate": setting.learning_rate,
                "hyperparameters": dict(setting.hyperparameters),
                "cost": {
                    "records": 960,
                    "distinct_records": 960,
                    "pairs": 3840,
                    "tokens": 320000,
                    "flops": 1e12,
                    "reference_flops": 0.0,
                },
            }
        keep(run_file(output, size, arm, seed), facts)


def test_verdicts_follow_the_runs(tmp_path):
    _write_runs(tmp_path, SEEDS, ["small", "large"], {AMOPO: 0.5, "dpo": 1.0})
    study = Study.load(tmp_path)
    words = {(each.arrow.better, each.arrow.worse): each.word for each in verdicts(study, "small")}
    assert words[AMOPO, SIMPO] == "holds"
    assert words[AMOPO, "dpo"] == "fails"
    assert words["three", "two"] == "not decided at this size"
    together = {(each.arrow.better, each.arrow.worse): each.word for each in verdicts(study, "small", "large")}
    assert together == {arrow: word.replace("this size", "these sizes") for arrow, word in words.items()}
    difference = study.difference(ARROWS[0], lambda run: run.mean, ["small", "large"])
    assert difference.mean == pytest.approx(0.5, abs=0.1)
    assert difference.number == len(SEEDS)  # a seed counts once, whatever its sizes


def _outcomes(general):
    return Outcomes({"general": digits(np.array(general, np.int8))})


def test_a_win_is_a_higher_total_and_a_tie_half_of_one():
    ours, theirs = (
        _outcomes([[5, 1, 3], [2, 2, 2], [1, 1, 5], [1, 1, 1]]),
        _outcomes([[1, 1, 1], [2, 2, 2], [1, 1, 3], [5, 5, 5]]),
    )
    assert (ours.wins_against(theirs), theirs.wins_against(ours)) == (0.625, 0.375)
    assert ours.worst == pytest.approx(5 / 4)
    assert ours.mean == pytest.approx(25 / 12)


def test_differences_are_taken_within_seeds():
    """Seeds differ by points, arms by one point under each: no width is left."""
    runs = {
        ("small", arm, seed): _outcomes(np.full((4, 3), 1 + seed % 3 + lift))
        for seed in SEEDS
        for arm, lift in ((AMOPO, 1), (SIMPO, 0))
    }
    study = Study(runs)
    found = study.difference(Arrow(AMOPO, SIMPO), lambda run: run.mean, ["small"])
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    wins = study.wins("small", AMOPO, SIMPO)
    assert (wins.mean, wins.low, wins.high) == pytest.approx((0.5, 0.5, 0.5))


def test_half_a_size_stays_out_of_a_whole_one(tmp_path):
    """Its first seeds, while it runs, don't thin the other size's differences."""
    _write_runs(tmp_path, SEEDS, ["small"], {AMOPO: 0.5})
    _write_runs(tmp_path, SEEDS[:1], ["large"], {AMOPO: 0.5})
    (row,) = (line for line in _further(Study.load(tmp_path)).splitlines() if line.startswith("| AMoPO − SFT"))
    assert "| small |" in row
    assert "one seed" not in row


def test_no_verdict_before_all_planned_runs(tmp_path):
    _write_runs(tmp_path, SEEDS, ["small"], {AMOPO: 0.5})
    _write_runs(tmp_path, SEEDS[:-1], ["large"], {AMOPO: 0.5})
    study = Study.load(tmp_path)
    found = verdicts(study, "large")
    assert {each.word for each in found} == {"too early"}
    assert found[0].estimate.mean == pytest.approx(0.5, abs=0.1)
    assert "too early" not in {each.word for each in verdicts(study, "small")}
    assert {each.word for each in verdicts(study, "small", "large")} == {"too early"}
    _write_runs(tmp_path, SEEDS[-1:], ["large"], {AMOPO: 0.5}, names=(AMOPO, "uniform"))
    words = {(each.arrow.better, each.arrow.worse): each.word for each in verdicts(Study.load(tmp_path), "large")}
    assert words.pop((AMOPO, "uniform")) == "holds"
    assert set(words.values()) == {"too early"}


def test_report(tmp_path, capsys):
    claim_folder(tmp_path)
    _write_runs(tmp_path, SEEDS[:2], ["small"], {AMOPO: 0.5})
    assert main(["--output", str(tmp_path), "--report-only"]) == 0
    assert "small: AMoPO > DPO: too early" in capsys.readouterr().out
    page = (tmp_path / "report/README.md").read_text()
    assert "This is a part of the study: 32 of 192 runs" in page
    assert "2 of 6 seeds at the small size, 0 of 6 seeds at the large size" in page
    assert str(tmp_path) not in page
    assert re.search(r"half of the answers it comes out \+0\.\d+ higher", page)  # the scores are all noise
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert len(results["runs"]) == 32
    assert len(results["verdicts"]) == (1 + len(SIZES)) * len(ARROWS)
    for name in ("claims", "methods", "asked"):
        assert (tmp_path / f"report/{name}.png").stat().st_size > 10_000


def test_report_of_starting_models_alone(tmp_path):
    """They are measured before the tuning is done."""
    _write_runs(tmp_path, SEEDS[:2], ["small"], {}, names=[START])
    assert "too early" in write_report(tmp_path, tmp_path / "report")
    assert "2 of 192 runs are in" in (tmp_path / "report/README.md").read_text()


def test_slope_and_error_of_a_model_that_obeys(tmp_path):
    _write_runs(tmp_path, SEEDS[:1], ["small"], {})
    file = run_file(tmp_path, "small", AMOPO, 0)
    facts = json.loads(file.read_text())
    asked = np.full((3, 5, 4, 3), 1, dtype=np.int8)
    for k, level in itertools.product(range(3), range(5)):
        asked[k, level, :, k] = level + 1
    keep(file, facts | {"asked": digits(asked)})
    run = Study.load(tmp_path).runs["small", AMOPO, 0]
    assert (run.slope, run.error) == pytest.approx((1.0, 0.0))
