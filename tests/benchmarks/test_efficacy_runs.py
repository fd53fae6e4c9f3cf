"""The study from its data to a finished run, little of it: what an arm reads is what its name says, and what a run
keeps is what its model was asked.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.efficacy.arms import AMOPO, BY_NAME, SEEDS, START, TUNING_SEED, grid, ordered_by
from benchmarks.efficacy.outcomes import Outcomes
from benchmarks.efficacy.runs import chosen_setting, keep, run_file, tuning_file
from benchmarks.efficacy.sampling import LEVELS, Sampler
from benchmarks.efficacy.seeds import seed_folder
from benchmarks.efficacy.task import DIMENSIONS, Request
from megatron_amopo.certification.ranks import RankPool
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.tokenize import ChatTokenizer, TokenizerSource

pytestmark = pytest.mark.slow

SEED, SIZE = SEEDS[1], "small"
RECORDS, TUNING_REQUESTS, TEST_REQUESTS, ASKED_REQUESTS, STEPS = 24, 4, 6, 2, 10
TUNED = 5  # the setting that is tried; the other files of the grid are given
ARMS = (AMOPO, "modpo", START)


def little_study(output: Path) -> None:
    """Data, starting models, one tuning run and some runs that count, on a rank of their own."""
    from benchmarks.efficacy import arms, runs, seeds
    from examples.make_tiny_model import Shape

    arms.STEPS = runs.STEPS = STEPS
    runs.ASKED_REQUESTS = ASKED_REQUESTS
    seeds.LESSONS, seeds.RECORDS = 24, RECORDS
    seeds.TUNING_REQUESTS, seeds.TEST_REQUESTS = TUNING_REQUESTS, TEST_REQUESTS
    seeds.SIZE_BY_NAME = {SIZE: arms.Size(SIZE, Shape(layers=2, hidden=32, intermediate=64), fit_steps=2)}
    for seed in (SEED, TUNING_SEED):
        seeds.make_seed(output, seed)
        seeds.make_start(output, seed, SIZE)
    runs.tune(output, SIZE, AMOPO, TUNED)
    for arm in ("modpo", AMOPO):
        for number, setting in enumerate(grid(BY_NAME[arm])):
            file = tuning_file(output, SIZE, arm, number)
            if not file.exists():
                keep(file, {**vars(setting), "mean": 0.5})  # below every score
    for arm in ARMS:
        runs.run(output, SIZE, arm, SEED)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    with RankPool(1) as ranks:
        ranks.run(little_study, 1, folder)
    return folder


def prompts_and_responses(output: Path, data: str) -> list[tuple[list[str], list[str]]]:
    """Texts of every record."""
    folder = seed_folder(output, SEED)
    groups = PreparedGroups.open(folder / data)
    tokenizer = ChatTokenizer(TokenizerSource.load(folder / "tokenizer"))
    found = []
    for index in range(len(groups)):
        group = groups[index]
        found.append(
            (
                [tokenizer.decode(each) for each in group.prompts],
                [tokenizer.decode(each) for each in (group.chosen[0], group.rejected[0])],
            )
        )
    return found


def test_what_an_arm_reads(output):
    full = prompts_and_responses(output, "full")
    plain, silent = (prompts_and_responses(output, name) for name in ("plain", "no-score"))
    records = [json.loads(line) for line in (seed_folder(output, SEED) / "records.jsonl").read_text().splitlines()]
    assert len(full) == len(plain) == len(silent) == len(records) == RECORDS
    for (prompts, responses), (same, _), (without, _), record in zip(full, plain, silent, records, strict=True):
        assert same == [prompts[0]] * (1 + len(DIMENSIONS))
        assert without[0] == prompts[0]
        for name, own, unscored in zip(DIMENSIONS, prompts[1:], without[1:], strict=True):
            assert f"Focus on {name}." in own
            assert f"worth {record['chosen']['scores'][name]}." in own
            assert f"Focus on {name}." in unscored
            assert "of full worth." in unscored
            assert not any(f"worth {level}" in unscored for level in LEVELS)
            assert record["prompt"] in unscored
        assert responses[0].startswith(record["chosen"]["content"])
        assert responses[1].startswith(record["rejected"]["content"])
    assert [each[1] for each in plain] == [each[1] for each in silent] == [each[1] for each in full]


def test_modpo_reads_the_order_of_its_objective(output):
    groups = PreparedGroups.open(seed_folder(output, SEED) / "ordered")
    column = DIMENSIONS.index(ordered_by(SEED))
    assert 0 < len(groups) <= RECORDS
    for index in range(len(groups)):
        chosen, rejected = groups.scores(index)
        assert chosen[column] > rejected[column]


def test_what_a_run_keeps(output):
    tried = json.loads(tuning_file(output, SIZE, AMOPO, TUNED).read_text())
    assert tried["mean"] == pytest.approx(np.mean(tried["means"]))
    assert chosen_setting(output, SIZE, BY_NAME["no-score"]) == grid(BY_NAME[AMOPO])[TUNED]
    for arm in ARMS:
        facts = json.loads(run_file(output, SIZE, arm, SEED).read_text())
        outcomes = Outcomes(facts)
        assert outcomes.general.shape == (TEST_REQUESTS, len(DIMENSIONS))
        assert outcomes.asked.shape == (len(DIMENSIONS), len(LEVELS), ASKED_REQUESTS, len(DIMENSIONS))
        for scores in (outcomes.general, outcomes.asked):
            assert scores.min() >= 1
            assert scores.max() <= 5
        if arm != START:
            assert facts["cost"]["records"] == STEPS * BY_NAME[arm].records_per_step
            names = {name.partition("/")[2] for name in facts["training"] if name.startswith("margin/")}
            assert names == set(BY_NAME[arm].dimensions(SEED))
            assert (facts["cost"]["reference_flops"] > 0) == (arm == "modpo")
    assert not any((output / "scratch").iterdir())


def test_each_dimension_is_asked_for_each_level(monkeypatch):
    """What is asked stands where its scores come to lie."""
    words = ("Brazil", "Italy", "India", "Canada")
    requests = [Request("capitals", words, f"Name the capitals of {number} …") for number in range(2)]
    heard = []

    def answer(self, conversations, seed):
        heard.extend(conversations)
        return ["Brasilia, Rome, Delhi, Ottawa."] * len(conversations)

    monkeypatch.setattr(Sampler, "answer", answer)
    scores = Sampler.__new__(Sampler).asked(requests, seed=0)
    places = np.ndindex(scores.shape[:3])
    for turns, (k, level, request) in zip(heard, places, strict=True):
        text = " ".join(turn["content"] for turn in turns)
        assert f"Focus on {DIMENSIONS[k]}." in text
        assert f"worth {LEVELS[level]}." in text
        assert requests[request].text in text
