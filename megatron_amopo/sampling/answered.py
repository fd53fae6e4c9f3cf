"""Answer files read back for scoring: the conversation up to each answer, whatever the judge's format.

MT-bench's answers and those of Arena-Hard's older format don't hold the questions, which then come from their file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_amopo.data.prompts import Message
from megatron_amopo.errors import ConfigError, DataError
from megatron_amopo.sampling.json_records import json_records, read_text
from megatron_amopo.sampling.prompt_files import PromptFile


@dataclass(frozen=True)
class Answered:
    """One answer: `conversation` ends with it. `turn` counts from 1; `where` is its record's place in the file."""

    id: str
    turn: int
    conversation: tuple[Message, ...]
    where: str

    @property
    def prompt(self) -> str:
        """The user's turn that it answers."""
        return self.conversation[-2]["content"]

    @property
    def answer(self) -> str:
        return self.conversation[-1]["content"]


def read_answers(path: Path, questions: PromptFile | None = None) -> list[Answered]:
    """All answers of a file, turn by turn. Raises DataError naming file and record, ConfigError where the questions are
    needed.
    """
    asked = {question.id: question.turns for question in questions.questions} if questions is not None else None
    records = json_records(path, read_text(path))
    if not records:
        raise DataError(f"{path} holds no answers")
    answered = []
    for where, record in records:
        try:
            key, prompts, answers = _turns(record, where, asked)
            turns = list(zip(prompts, answers, strict=True))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise DataError(f"{path}, {where}: not an answer in a known format ({error!r})") from error
        conversation: list[Message] = []
        for turn, (prompt, answer) in enumerate(turns, 1):
            if not (isinstance(prompt, str) and isinstance(answer, str)):
                raise DataError(f"{path}, {where}: the prompt or the answer of turn {turn} is not text")
            conversation += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            answered.append(Answered(key, turn, tuple(conversation), where))
    return answered


def _turns(record: Any, where: str, asked: dict[str, tuple[str, ...]] | None) -> tuple[str, list[Any], list[Any]]:
    """Id, user turns and answers of a record."""
    if "choices" in record:
        key = str(record["question_id"])
        if asked is None:
            raise ConfigError("these answers don't hold the questions: name their file with --questions")
        turns = [turn["content"] if isinstance(turn, dict) else turn for turn in record["choices"][0]["turns"]]
        return key, list(asked[key]), turns
    if "messages" in record:
        *_, question, answer = record["messages"]
        return str(record["uid"]), [question["content"]], [answer["content"]["answer"]]
    if "instruction" in record:
        return where, [record["instruction"]], [record["output"]]
    return str(record.get("id", where)), [record["prompt"]], [record["answer"]]
