"""Questions from the prompt files of MT-bench, Arena-Hard and AlpacaEval, from plain JSONL and from lines of text.

The format is found from the first record. Takes a path; gives questions, each with one or more user turns, and what
the judge's own tools use to answer them (`Conventions`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_amopo.errors import DataError
from megatron_amopo.sampling.json_records import json_records, read_text

MT_BENCH, ARENA_HARD_TURNS, ARENA_HARD, ALPACA_EVAL = "mt-bench", "arena-hard-turns", "arena-hard", "alpaca-eval"
JSONL, TEXT = "jsonl", "text"
# An object, or a list of anything but numbers: text may begin with [INST] or [1].
_JSON = re.compile(r'\s*(\{|\[\s*[\[\]{"])')


@dataclass(frozen=True)
class Conventions:
    """How a benchmark's own tools answer its questions. Temperature 0 is greedy; `by_category` overrides it."""

    temperature: float
    max_tokens: int
    by_category: Mapping[str, float] = field(default_factory=dict)


# FastChat's llm_judge (common.py and gen_model_answer.py), arena-hard-auto's gen_answer_config.yaml, and what most of
# alpaca_eval's model configs say. Files of no benchmark are answered greedily.
_MT_BENCH_TEMPERATURES = MappingProxyType(
    {
        "writing": 0.7,
        "roleplay": 0.7,
        "extraction": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "reasoning": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
    }
)
CONVENTIONS: Mapping[str, Conventions] = MappingProxyType(
    {
        MT_BENCH: Conventions(0.7, 1024, _MT_BENCH_TEMPERATURES),
        ARENA_HARD_TURNS: Conventions(0.0, 4096),
        ARENA_HARD: Conventions(0.0, 4096),
        ALPACA_EVAL: Conventions(0.7, 2048),
        JSONL: Conventions(0.0, 1024),
        TEXT: Conventions(0.0, 1024),
    }
)


@dataclass(frozen=True)
class Question:
    """`turns` are the user's, in order; each but the first is asked after the model's answer to the one before.
    `record` is what the file says.
    """

    id: str
    turns: tuple[str, ...]
    category: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class PromptFile:
    """A file's questions and its format, a key of `CONVENTIONS`."""

    format: str
    questions: tuple[Question, ...]

    def temperature(self, question: Question) -> float:
        """At which the benchmark's own tools sample the answer."""
        conventions = CONVENTIONS[self.format]
        return conventions.by_category.get(question.category, conventions.temperature)

    @classmethod
    def read(cls, path: Path) -> PromptFile:
        """Raises DataError naming the file and the record."""
        text = read_text(path)
        is_json = _JSON.match(text) is not None
        if is_json:
            records = json_records(path, text)
        else:
            records = [(f"line {n}", {"prompt": line}) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not records:
            raise DataError(f"{path} holds no prompts")
        name = _format(*records[0], path) if is_json else TEXT
        questions = tuple(_question(path, where, name, record) for where, record in records)
        seen: dict[str, str] = {}
        for (where, _), question in zip(records, questions, strict=True):
            if question.id in seen:
                raise DataError(f"{path}, {where}: has the id of {seen[question.id]}, {question.id!r}")
            seen[question.id] = where
        return cls(name, questions)


def _format(where: str, record: Any, path: Path) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{path}, {where}: not a JSON object")
    if "turns" in record and "question_id" in record:
        turns = record["turns"]
        return ARENA_HARD_TURNS if isinstance(turns, list) and turns and isinstance(turns[0], dict) else MT_BENCH
    if "uid" in record and "prompt" in record:
        return ARENA_HARD
    if "instruction" in record:
        return ALPACA_EVAL
    if "prompt" in record:
        return JSONL
    raise DataError(
        f"{path}, {where}: no prompt (known are MT-bench's and Arena-Hard's question_id and turns, Arena-Hard's uid "
        "and prompt, AlpacaEval's instruction, and prompt)"
    )


# format -> (id, user turns) of a record
_FIELDS: Mapping[str, Callable[[dict[str, Any], str], tuple[Any, list[Any]]]] = {
    MT_BENCH: lambda record, _: (record["question_id"], record["turns"]),
    ARENA_HARD_TURNS: lambda record, _: (record["question_id"], [turn["content"] for turn in record["turns"]]),
    ARENA_HARD: lambda record, _: (record["uid"], [record["prompt"]]),
    ALPACA_EVAL: lambda record, where: (where, [record["instruction"]]),
    JSONL: lambda record, where: (record.get("id", where), [record["prompt"]]),
    TEXT: lambda record, where: (where, [record["prompt"]]),
}


def _question(path: Path, where: str, name: str, record: Any) -> Question:
    try:
        key, turns = _FIELDS[name](record, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}, {where}: not a record of the format {name} like the first ({error!r})") from error
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise DataError(f"{path}, {where}: its prompt is not text, or empty")
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise DataError(f"{path}, {where}: its id is neither text nor a whole number")
    return Question(str(key), tuple(turns), str(record.get("category", "")), record)
