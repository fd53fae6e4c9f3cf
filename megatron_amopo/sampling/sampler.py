"""Answers to all questions of a file: conversations under the wanted prompt, batches, turns, and the output file.

Prompts are encoded by the code that encoded the training data, so that the model is asked in the very tokens of
training, and control tokens' names in a question stay text.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_amopo.data.model_prompts import ModelPrompts
from megatron_amopo.data.problems import MEANINGS, RecordProblem
from megatron_amopo.data.prompts import Message
from megatron_amopo.data.tokenize import ChatTokenizer, TokenizerSource
from megatron_amopo.errors import ConfigError, DataError
from megatron_amopo.sampling.answer_files import Answer, write_answers
from megatron_amopo.sampling.engines import Engine, Request, answer_seed
from megatron_amopo.sampling.prompt_files import CONVENTIONS, PromptFile, Question
from megatron_amopo.sampling.unfinished import Unfinished
from megatron_amopo.sampling.whole_model import files_state


@dataclass(frozen=True)
class Sampling:
    """How to sample. None: as the benchmark's own tools do, see `CONVENTIONS`. `prompts` None: without prompts."""

    prompts: ModelPrompts | None
    want: dict[str, float]
    temperature: float | None = None
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: above 0, at most 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"--max-tokens {self.max_tokens}: at least 1")
        if self.prompts is not None:
            self.prompts.check(self.want)

    def conversation(self, messages: Sequence[Message]) -> list[Message]:
        """The messages under the wanted prompt."""
        return list(messages) if self.prompts is None else self.prompts.conversation(messages, self.want)


def open_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer of a model folder. Raises DataError naming the folder."""
    try:
        return ChatTokenizer(TokenizerSource.load(folder))
    except DataError as error:
        raise DataError(str(error).removeprefix("--tokenizer ")) from error


def sample_file(
    engine: Engine,
    tokenizer: ChatTokenizer,
    prompt_file: PromptFile,
    sampling: Sampling,
    output: Path,
    folder: Path,
    model_id: str,
    *,
    progress: bool = False,
) -> int:
    """Answer every question and write `output`; how many answers a run before had left. `folder` is the model's.

    Raises:
        AmopoError: the model's template refuses the prompts, a question doesn't fit, or an unfinished output of other
            settings is there.
    """
    _check_prompts(tokenizer, sampling, prompt_file.questions[0])
    temperatures = {
        question.id: prompt_file.temperature(question) if sampling.temperature is None else sampling.temperature
        for question in prompt_file.questions
    }
    limit = sampling.max_tokens or CONVENTIONS[prompt_file.format].max_tokens
    settings: dict[str, Any] = {
        "prompt": "plain" if sampling.prompts is None else sampling.want or "general",
        "top_p": sampling.top_p,
        "max_tokens": limit,
        "seed": sampling.seed,
        "engine": engine.name,
    }
    questions = repr([(question.id, question.turns) for question in prompt_file.questions])
    style = None if sampling.prompts is None else sampling.prompts.style.content
    asked = {
        **settings,
        "model": model_id,
        "files": files_state(folder),
        "temperatures": temperatures,
        "questions_sha256": hashlib.sha256(questions.encode()).hexdigest(),
        "style": style,
        "dimensions": None if sampling.prompts is None else sampling.prompts.dimensions,
    }
    unfinished = Unfinished(output, asked)
    found = len(unfinished.found)
    # Batches of like lengths are padded least.
    open_questions = sorted(
        (question for question in prompt_file.questions if question.id not in unfinished.found),
        key=lambda question: (len(question.turns), len(question.turns[0])),
    )
    with tqdm(total=len(prompt_file.questions), initial=found, unit="question", disable=not progress) as bar:
        for start in range(0, len(open_questions), engine.batch_size):
            batch = open_questions[start : start + engine.batch_size]
            answers = _answer(engine, tokenizer, batch, sampling, temperatures, limit)
            unfinished.add({key: asdict(answer) for key, answer in answers.items()})
            bar.update(len(batch))
    in_order = [Answer.of(unfinished.found[question.id]) for question in prompt_file.questions]
    write_answers(output, prompt_file, in_order, list(temperatures.values()), model_id, settings)
    unfinished.remove()
    return found


def _check_prompts(tokenizer: ChatTokenizer, sampling: Sampling, question: Question) -> None:
    conversation = sampling.conversation([{"role": "user", "content": question.turns[0]}])
    if reason := tokenizer.refuses(conversation):
        raise ConfigError(f"the model's chat template {reason}")


def _answer(
    engine: Engine,
    tokenizer: ChatTokenizer,
    questions: Sequence[Question],
    sampling: Sampling,
    temperatures: dict[str, float],
    limit: int,
) -> dict[str, Answer]:
    """Answers to a batch of questions, by their ids: turn by turn, each question as long as it has turns."""
    messages: dict[str, list[Message]] = {question.id: [] for question in questions}
    tokens: dict[str, list[int]] = {question.id: [] for question in questions}
    ended: dict[str, list[bool]] = {question.id: [] for question in questions}
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [question for question in questions if len(question.turns) > turn]
        requests = []
        for question in asked:
            messages[question.id].append({"role": "user", "content": question.turns[turn]})
            requests.append(
                Request(
                    question=question.id,
                    prompt=_encode(tokenizer, question, sampling.conversation(messages[question.id])),
                    temperature=temperatures[question.id],
                    top_p=sampling.top_p,
                    max_tokens=limit,
                    seed=answer_seed(sampling.seed, question.id, turn),
                )
            )
        for question, generated in zip(asked, engine.generate(requests), strict=True):
            text = tokenizer.decode(generated.ids).strip()
            messages[question.id].append({"role": "assistant", "content": text})
            tokens[question.id].append(len(generated.ids))
            ended[question.id].append(generated.ended)
    now = time.time()
    return {
        question.id: Answer(
            turns=tuple(message["content"] for message in messages[question.id][1::2]),
            tokens=tuple(tokens[question.id]),
            ended=tuple(ended[question.id]),
            tstamp=now,
        )
        for question in questions
    }


def _encode(tokenizer: ChatTokenizer, question: Question, conversation: list[Message]) -> np.ndarray:
    try:
        return tokenizer.encode_prompt(conversation)
    except RecordProblem as problem:
        why = f"{MEANINGS[problem.reason]} ({problem.detail})"
        raise DataError(f"question {question.id!r} can't be asked: {why}") from problem
