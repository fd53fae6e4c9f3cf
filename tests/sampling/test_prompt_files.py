"""Prompt files: formats recognised by themselves, what each benchmark's tools do, and refusals that name the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_amopo.errors import DataError
from megatron_amopo.sampling.prompt_files import CONVENTIONS, PromptFile
from tests.support.shared import SHARED_DATA

FORMATS = {
    "mt-bench": {"question_id": 81, "category": "writing", "turns": ["One.", "Two."]},
    "arena-hard-turns": {"question_id": "f0", "category": "arena-hard-v0.1", "turns": [{"content": "One."}]},
    "arena-hard": {"uid": "f0", "category": "hard_prompt", "subcategory": "math", "language": "en", "prompt": "One."},
    "alpaca-eval": {"instruction": "One.", "output": "Yes.", "generator": "x", "dataset": "helpful_base"},
    "jsonl": {"prompt": "One.\u2028Two", "chosen": {"content": "a"}},
}


def read(folder: Path, text: str) -> PromptFile:
    (folder / "prompts").write_text(text, encoding="utf-8")
    return PromptFile.read(folder / "prompts")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("as_list", [False, True], ids=["lines", "list"])
def test_formats(tmp_path: Path, name: str, as_list: bool) -> None:
    record = FORMATS[name]
    found = read(tmp_path, json.dumps([record], indent=1) if as_list else json.dumps(record, ensure_ascii=False) + "\n")
    assert found.format == name
    (question,) = found.questions
    assert question.record == record
    expected = {"mt-bench": ("One.", "Two."), "jsonl": ("One.\u2028Two",)}
    assert question.turns == expected.get(name, ("One.",))


def test_text_lines(tmp_path: Path) -> None:
    found = read(tmp_path, "\ufeffWhy?\n\n  How?\n")
    assert [(question.id, question.turns) for question in found.questions] == [
        ("line 1", ("Why?",)),
        ("line 3", ("  How?",)),
    ]
    assert found.format == "text"
    assert found.temperature(found.questions[0]) == 0


@pytest.mark.parametrize("line", ["[INST] Why? [/INST]", "[1] Why?", "a\u2028b\x0bc\x85d"])
def test_any_line_may_be_text(tmp_path: Path, line: str) -> None:
    """A bracket in front doesn't make it JSON, and nothing but a line's end ends it."""
    found = read(tmp_path, f"{line}\nHow?\n")
    assert (found.format, [question.turns[0] for question in found.questions]) == ("text", [line, "How?"])


def test_temperatures_by_category(tmp_path: Path) -> None:
    categories = {"writing": 0.7, "roleplay": 0.7, "math": 0, "coding": 0, "stem": 0.1, "something else": 0.7}
    records = [{"question_id": n, "category": name, "turns": ["?"]} for n, name in enumerate(categories)]
    found = read(tmp_path, "".join(json.dumps(record) + "\n" for record in records))
    assert [found.temperature(question) for question in found.questions] == list(categories.values())
    assert CONVENTIONS["arena-hard"].temperature == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompts"),
        ('{"question": "?"}', "line 1: no prompt"),
        ('{"prompt": "?"}\n{"instruction": "?"}', "line 2: not a record of the format jsonl"),
        ('{"prompt": "?"}\n{"prompt": ', "line 2: not valid JSON"),
        ('{"prompt": ["?"]}', "line 1: its prompt is not text"),
        ('{"question_id": 1, "turns": []}', "line 1: its prompt is not text, or empty"),
        ('{"uid": "a", "prompt": "?"}\n{"uid": "a", "prompt": "!"}', "line 2: has the id of line 1"),
        ("[[1]]", "record 1: not a JSON object"),
        ('["?"]', "record 1: not a JSON object"),
        ('{"prompt": "?"}\n{"prompt": null}', "line 2: its prompt is not text"),
        ('{"prompt": "?"}\n3', "line 2: not a record of the format jsonl"),
        ('{"prompt": "?", "id": null}', "line 1: its id is neither text nor a whole number"),
        ('{"prompt": "?", "id": NaN}', "line 1: not valid JSON"),
        ('{"prompt": "?"}\n{"prompt": "\\ud800?"}', "line 2: holds half of a surrogate pair"),
        ('[{"prompt": "?"}, {"prompt": "\\udfff"}]', "record 2: holds half of a surrogate pair"),
        ('{"prompt": "?"}\n{"prompt": "?", "x": ' + "[" * 200_000, "line 2: not valid JSON"),
        ('{"prompt": "?", "x": ' + "[" * 5000 + "]" * 5000 + "}", "line 1: not valid JSON"),
        ("[" * 200_000, "prompts: not valid JSON"),
    ],
)
def test_refusals_name_the_record(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, text)


@pytest.mark.skipif(not (SHARED_DATA / "eval_prompts").is_dir(), reason="needs the benchmarks' prompts")
@pytest.mark.parametrize(
    ("file", "name", "count", "turns"),
    [("mt_bench.jsonl", "mt-bench", 80, 2), ("arena_hard_v0.1.jsonl", "arena-hard", 500, 1)],
)
def test_published_files(file: str, name: str, count: int, turns: int) -> None:
    found = PromptFile.read(SHARED_DATA / "eval_prompts" / file)
    assert (found.format, len(found.questions)) == (name, count)
    assert {len(question.turns) for question in found.questions} == {turns}
