"""The scoring command: rules, answers in every format, and a run that is stopped and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_amopo.sampling.scorers.score import Score, summaries
from tests.sampling.conftest import PLAIN
from tools.score_answers import main

RULES = "def score_answer(prompt, answer):\n    return {'length': len(answer), 'echo': prompt in answer}\n"
MT_QUESTIONS = [{"question_id": 81, "category": "math", "turns": ["One?", "Two?"]}]
MT_ANSWERS = [{"question_id": 81, "model_id": "x", "choices": [{"index": 0, "turns": ["1", "22"]}]}]
ARENA = [
    {"uid": "u", "messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": {"answer": "aaa"}}]}
]
ALPACA = [{"instruction": "A?", "output": "aaaa", "generator": "x"}]


@pytest.fixture
def rules(tmp_path) -> str:
    (tmp_path / "rules.py").write_text(RULES)
    return f"rules:{tmp_path / 'rules.py'}"


def test_rules(score, rules, tmp_path, capsys):
    assert score(PLAIN, rules) == [
        {"id": "1", "turn": 1, "scores": {"length": 8, "echo": 1}},
        {"id": "2", "turn": 1, "scores": {"length": 3, "echo": 0}},
    ]
    table = capsys.readouterr().out
    assert "5.500" in table  # the mean length
    (tmp_path / "questions").write_text(json.dumps(MT_QUESTIONS[0]))
    found = score(MT_ANSWERS, rules, "--questions", str(tmp_path / "questions"))
    assert [(row["turn"], row["scores"]["length"]) for row in found] == [(1, 1), (2, 2)]
    assert score(ARENA, rules)[0]["scores"]["length"] == 3
    assert score(ALPACA, rules)[0]["scores"]["length"] == 4
    assert "--questions" in score(MT_ANSWERS, rules, code=2)


def test_the_demo_is_scored_by_its_rules(score):
    request = (
        "Name the capitals of Brazil, Italy, India and Canada. Separate them with dashes, put a star before the list, "
        "use at most 18 words and end with done."
    )
    (row,) = score(
        [{"prompt": request, "answer": "* Brasilia - Rome - Delhi - Ottawa done"}], "rules:examples/data/rules.py"
    )
    assert row["scores"] == {"helpfulness": 1, "correctness": 5, "instruction_following": 5}


@pytest.mark.parametrize(
    ("records", "scorer", "flags", "said"),
    [
        (PLAIN, "rules:nowhere.py", [], "no Python file"),
        (PLAIN, "magic:x", [], "rules:FILE.py, reward-model:DIR or judge:URL"),
        (PLAIN, "judge:http://x", [], "--judge-model"),
        (PLAIN, "judge:x", ["--judge-model", "m"], "a URL with http"),
        (PLAIN, "rules:x", ["--judge-model", "m"], "--judge-model is of --scorer judge"),
        (PLAIN, "rules:x", ["--batch-size", "1"], "--batch-size is of --scorer reward-model"),
        ([{"text": "?"}], "rules:", [], "rules:FILE.py"),
    ],
)
def test_refusals(score, records, scorer, flags, said):
    assert said in score(records, scorer, *flags, code=2)


def test_rules_that_fail(score, tmp_path):
    path = tmp_path / "rules.py"
    for text, said in (
        ("x = 1", "no function score_answer"),
        ("x = ", "fails to load"),
        ("def score_answer(p, a):\n    return {'x': 1 / (len(a) - 3)}", "fails on the answer to '2' (line 2), turn 1"),
    ):
        path.write_text(text)
        assert said in score(PLAIN, f"rules:{path}", code=2)
    path.write_text(RULES)
    assert "line 1: not an answer" in score([{"text": "?"}], f"rules:{path}", code=2)


def test_the_answers_are_not_replaced_by_their_scores(rules, tmp_path: Path, capsys):
    answers = tmp_path / "answers"
    answers.write_text(json.dumps(PLAIN[0]) + "\n")
    assert main([str(answers), "--scorer", rules, "--output", str(answers), "--force"]) == 2
    assert "is one of the inputs" in capsys.readouterr().err
    assert json.loads(answers.read_text()) == PLAIN[0]


def test_summaries():
    (row,) = summaries([Score({"a": 1.0}), Score({}), Score({"a": 4.0})])
    assert (row.name, row.count, row.mean, row.lowest, row.highest) == ("a", 2, 2.5, 1, 4)
    assert row.deviation == pytest.approx(4.5**0.5)


def test_the_rules_file_may_hold_dataclasses(score, tmp_path: Path):
    path = tmp_path / "with_classes.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        + RULES
    )
    assert score(PLAIN, f"rules:{path}")[0]["scores"]["length"] == 8


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "1", "prompt": "Why?", "answer": null}', "answer of turn 1 is not text"),
        ('{"id": "1", "prompt": ["Why?"], "answer": "So."}', "answer of turn 1 is not text"),
        ('{"uid": "1", "messages": [{"content": "A?"}, {"content": {"answer": 3}}]}', "answer of turn 1 is not text"),
        ('{"id": "1", "prompt": "Why?", "answer": "\\ud800"}', "half of a surrogate pair"),
        ('{"id": "1", "prompt": "Why?", "answer": ' + "[" * 200_000, "not valid JSON"),
        ('{"id": "1", "prompt": "Why?", "answer": "So."', "not valid JSON"),
        ('"id, answer"', "not an answer in a known format"),
    ],
)
def test_answers_that_are_none_are_named(rules, tmp_path: Path, capsys, line, said):
    path = tmp_path / "answers"
    path.write_text(f"{json.dumps(PLAIN[0])}\n\n{line}\n")
    assert main([str(path), "--scorer", rules, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 3: " in error
    assert said in error
    assert error.count("\n") == 1


def test_a_line_separator_within_an_answer_is_text(score, rules, tmp_path: Path):
    (tmp_path / "one").write_text(json.dumps({"prompt": "Why?", "answer": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert main([str(tmp_path / "one"), "--scorer", rules, "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out").read_text())["scores"]["length"] == 3


def test_numbers_that_json_does_not_have_are_no_scores(score, tmp_path: Path, capsys):
    path = tmp_path / "rules.py"
    path.write_text("def score_answer(p, a):\n    return {'[x]': float('nan' if p == 'Why?' else 'inf'), 'n': 1}\n")
    found = score(PLAIN, f"rules:{path}")
    assert [(row["scores"], row["reason"]) for row in found] == [({"n": 1}, "[x] is nan"), ({"n": 1}, "[x] is inf")]
    path.write_text("def score_answer(p, a):\n    return {'[x]': 1} if p == 'Why?' else {}\n")
    capsys.readouterr()
    found = score(PLAIN, f"rules:{path}")
    assert [row.get("reason") for row in found] == [None, "the scorer gave none"]
    said = capsys.readouterr().out
    assert "1 of them without a score" in said
    assert "[x]" in said
    assert "no score: line 2, turn 1: the scorer gave none" in said


def test_a_stopped_run_goes_on(score, tmp_path: Path):
    """Scores of before aren't computed again, and aren't taken for those of other answers or rules."""
    path, log, partial = tmp_path / "rules.py", tmp_path / "log", tmp_path / "scores.partial"
    path.write_text(
        "import pathlib\n"
        "def score_answer(p, a):\n"
        f"    log = pathlib.Path({str(log)!r})\n"
        "    asked = log.read_text() if log.exists() else ''\n"
        "    log.write_text(asked + p)\n"
        "    if asked == 'Why?':\n"
        "        raise KeyboardInterrupt\n"
        "    return {'length': len(a)}\n"
    )
    assert "the same command goes on from here" in score(PLAIN, f"rules:{path}", code=130)
    partial.write_text(partial.read_text() + '{"id": "1", "sco')  # a line that a kill cut off
    assert "other inputs or settings" in score(PLAIN[::-1], f"rules:{path}", code=2)
    written = path.read_text()
    path.write_text(written + "# other rules\n")
    assert "other inputs or settings" in score(PLAIN, f"rules:{path}", code=2)
    path.write_text(written)
    assert [row["scores"] for row in score(PLAIN, f"rules:{path}")] == [{"length": 8}, {"length": 3}]
    assert log.read_text() == "Why?How?How?"
    assert not partial.exists()
    partial.write_text("no JSON\n")
    assert "other inputs or settings" in score(PLAIN, f"rules:{path}", code=2)
