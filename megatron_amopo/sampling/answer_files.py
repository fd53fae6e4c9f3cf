"""Answers in the formats that judges read, each as the benchmark's own tools write them.

Takes questions and the model's answers; gives JSON lines (AlpacaEval: one JSON list, which is what it reads). What is
not in a judge's format stands under one more key, `amopo`: how the answers were sampled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_amopo.sampling.prompt_files import (
    ALPACA_EVAL,
    ARENA_HARD,
    ARENA_HARD_TURNS,
    MT_BENCH,
    PromptFile,
    Question,
)

_ID_CHARACTERS = 22  # as shortuuid's, which the judges' own tools use


@dataclass(frozen=True)
class Answer:
    """A model's answers to a question's turns, their lengths in its own tokens, whether each ended by itself (rather
    than at the limit), and when the last was there, in seconds since 1970.
    """

    turns: tuple[str, ...]
    tokens: tuple[int, ...]
    ended: tuple[bool, ...]
    tstamp: float

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Answer:
        """From what JSON made of its fields."""
        return cls(tuple(fields["turns"]), tuple(fields["tokens"]), tuple(fields["ended"]), fields["tstamp"])


def write_answers(
    path: Path,
    prompts: PromptFile,
    answers: Sequence[Answer],
    temperatures: Sequence[float],
    model_id: str,
    settings: Mapping[str, Any],
) -> None:
    """Write all answers, in the questions' order, beside and renamed. `settings` are all answers' own."""
    records = []
    for question, answer, temperature in zip(prompts.questions, answers, temperatures, strict=True):
        how: Any = {**settings, "temperature": temperature, "ended": list(answer.ended)}
        if prompts.format == ALPACA_EVAL:
            how = json.dumps(how)  # its tools make a table of the records, whose cells are plain values
        records.append({**_record(prompts.format, question, answer, model_id), "amopo": how})
    if prompts.format == ALPACA_EVAL:
        text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    else:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _record(name: str, question: Question, answer: Answer, model_id: str) -> dict[str, Any]:
    answer_id = _answer_id(model_id, question, answer)
    if name in (MT_BENCH, ARENA_HARD_TURNS):
        turns: list[Any] = list(answer.turns)
        more = {}
        if name == ARENA_HARD_TURNS:
            turns = [{"content": text, "token_len": n} for text, n in zip(answer.turns, answer.tokens, strict=True)]
            more = {"conv_metadata": _style(answer)}
        return {
            "question_id": question.record["question_id"],
            "answer_id": answer_id,
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": answer.tstamp,
            **more,
        }
    (text,) = answer.turns
    if name == ARENA_HARD:
        return {
            "uid": question.record["uid"],
            "ans_id": answer_id,
            "model": model_id,
            "messages": [
                {"role": "user", "content": question.turns[0]},
                {"role": "assistant", "content": {"answer": text}},
            ],
            "tstamp": answer.tstamp,
            "metadata": _style(answer),
        }
    if name == ALPACA_EVAL:
        dataset = {"dataset": question.record["dataset"]} if "dataset" in question.record else {}
        return {**dataset, "instruction": question.turns[0], "output": text, "generator": model_id}
    return {"id": question.id, "prompt": question.turns[0], "answer": text, "model": model_id}


def _answer_id(model_id: str, question: Question, answer: Answer) -> str:
    """The same for the same answer of the same model to the same question."""
    text = json.dumps([model_id, question.id, answer.turns])
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_CHARACTERS]


def _style(answer: Answer) -> dict[str, Any]:
    """What Arena-Hard's style control asks of an answer: its length and its Markdown outside code blocks, counted by
    the same rules. The length is in the model's own tokens; Arena-Hard counts in GPT-4o's.
    """
    text = re.sub("```[^`]*```", "``````", "\n".join(answer.turns))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "token_len": sum(answer.tokens),
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }
