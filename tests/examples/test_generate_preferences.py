"""The demo's data: seeded, scored by the rules, in conflict between dimensions, with held-out requests that are new."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from examples.data import generate_preferences as generator
from examples.data.rules import DIMENSIONS, KINDS, MARKERS, SEPARATORS, parse, score

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return generator.generate(seed=1, records=2000, held_out=400)


def test_scores_are_what_the_rules_say(parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    for record in (*parts[0], *parts[1]):
        request = parse(record["prompt"])
        for side in ("chosen", "rejected"):
            assert record[side]["scores"] == score(request, record[side]["content"])


def test_chosen_has_the_higher_total(parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    for record in (*parts[0], *parts[1]):
        assert sum(record["chosen"]["scores"].values()) > sum(record["rejected"]["scores"].values())


def test_dimensions_conflict(parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    for records in parts:
        assert 0.2 <= generator.conflict_rate(records) <= 0.6
        for name in DIMENSIONS:
            worse = [record["chosen"]["scores"][name] < record["rejected"]["scores"][name] for record in records]
            assert sum(worse) >= 0.05 * len(records), name


def test_every_score_level_occurs(parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    records, _ = parts
    for name in DIMENSIONS:
        levels = [record[side]["scores"][name] for record in records for side in ("chosen", "rejected")]
        for level in range(1, 6):
            assert levels.count(level) >= 0.02 * len(levels), (name, level)


def test_length_and_scores_vary_on_their_own(parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    """No dimension is the answer's length, and none is another one, in disguise."""
    answers = [record[side] for record in parts[0] for side in ("chosen", "rejected")]
    columns = {name: [float(answer["scores"][name]) for answer in answers] for name in DIMENSIONS}
    columns["length"] = [float(len(answer["content"])) for answer in answers]
    for first, second in [
        ("helpfulness", "correctness"),
        ("correctness", "instruction_following"),
        *((n, "length") for n in DIMENSIONS),
    ]:
        assert abs(_correlation(columns[first], columns[second])) < 0.75, (first, second)
    assert min(columns["length"]) * 3 < max(columns["length"])


def test_held_out_requests_are_new(parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    train, held_out = parts
    prompts = [record["prompt"] for record in (*train, *held_out)]
    assert len(set(prompts)) == len(prompts)

    def combinations(records: list[dict[str, Any]]) -> set[tuple[str, frozenset[str]]]:
        requests = [parse(record["prompt"]) for record in records]
        return {(request.kind, frozenset(request.items)) for request in requests}

    assert not combinations(train) & combinations(held_out)


def test_the_seed_decides(tmp_path: Path) -> None:
    first, again, other = (generator.generate(seed=seed, records=50, held_out=10) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    # the same prefix whatever the number of records, so that a larger set contains the smaller one
    assert generator.generate(seed=3, records=80, held_out=20)[0][:50] == first[0]


@pytest.mark.parametrize("opening", generator.OPENINGS)
def test_request_text_is_the_inverse_of_parse(
    opening: str, parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    for record in parts[1][:50]:
        request = parse(record["prompt"])
        assert parse(generator.request_text(request, opening)) == request


def test_phrases_hold_no_words_of_the_task() -> None:
    """A courtesy that contained an answer word would change the score of another dimension."""
    words = {
        word.casefold() for kind in KINDS.values() for asked, answers in kind.items() for word in (asked, *answers)
    }
    phrases = [*generator.SMALL_TALK, *(text for texts in generator.WORDINGS.values() for text in texts)]
    said = {word.strip(".:!").casefold() for phrase in phrases for word in phrase.split()}
    assert not said & words


@pytest.mark.parametrize("courtesies", range(5))
@pytest.mark.parametrize("right_items", range(5))
def test_answers_keep_to_their_plan(courtesies: int, right_items: int) -> None:
    rng = generator.random.Random(courtesies * 5 + right_items)
    for form_rules, record in enumerate(generator.generate(seed=2, records=4, held_out=1)[0]):
        request = parse(record["prompt"])
        plan = generator.Plan(courtesies=courtesies, right_items=right_items, form_rules=form_rules)
        scores = score(request, generator.compose_answer(rng, request, plan))
        assert scores["helpfulness"] == 1 + courtesies
        assert scores["correctness"] == 1 + right_items
        assert scores["instruction_following"] in (1 + form_rules, 2 + form_rules)  # the word limit falls as it may


def test_command_line_writes_both_files(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "examples/data/generate_preferences.py",
        "--output",
        str(tmp_path),
        "--records",
        "20",
        "--held-out",
        "5",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "20 records" in done.stdout
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == generator.generate(seed=1, records=20, held_out=5)[0]
    assert len((tmp_path / "held_out.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.jsonl", "train.jsonl"]


def test_signs_are_distinct() -> None:
    signs: Callable[[Any], list[str]] = lambda table: sorted(table.values())  # noqa: E731
    for table in (SEPARATORS, MARKERS):
        assert all(a != b for a, b in pairwise(signs(table)))


def _correlation(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / (sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)) ** 0.5
