"""Scores by a reward model: a folder that transformers loads as a sequence classifier.

The conversation goes through the folder's own chat template, control tokens' names in it as text. A model of one output
gives `reward`; one of several gives a score for each, by the names in its config. Every score is the one that the model
gives for the conversation by itself, whatever else is in its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from megatron_amopo.data.chat_template import ChatTemplate, TemplateRefusal
from megatron_amopo.data.encoding import TextEncoder
from megatron_amopo.data.problems import MEANINGS, RecordProblem
from megatron_amopo.data.prompts import Message
from megatron_amopo.data.tokenize import TokenizerSource
from megatron_amopo.errors import ConfigError, DataError
from megatron_amopo.sampling.answered import Answered
from megatron_amopo.sampling.scorers.score import Score
from megatron_amopo.sampling.whole_model import files_state, load_whole

_QUESTION, _ANSWER = "Why is the sky blue?", "Because of Rayleigh scattering."


class RewardModel:
    """Loaded on the GPU, where there is one, in the type of its weights."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        """Raises ConfigError where transformers can't load the folder, or it lacks weights or a usable chat
        template.
        """
        from transformers import AutoModelForSequenceClassification

        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        named = f"--scorer reward-model:{folder}"
        self.model: Any = load_whole(AutoModelForSequenceClassification, folder, named).to(self.device)
        self.config: Any = self.model.config.get_text_config()
        self.context = getattr(self.config, "max_position_embeddings", None)
        self.encoder = _ConversationEncoder(folder, named)
        labels = self.model.config.id2label
        self.names = ["reward"] if len(labels) == 1 else [str(labels[index]) for index in range(len(labels))]
        self.identity = {"reward-model": files_state(folder)}

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, Score]]:
        """Batches of like lengths."""
        encoded: dict[int, np.ndarray] = {}
        for place, each in enumerate(answers):
            try:
                ids = self.encoder.encode(each.conversation)
            except RecordProblem as problem:
                yield place, Score({}, reason=f"{MEANINGS[problem.reason]} ({problem.detail})")
                continue
            if self.context is not None and len(ids) > self.context:
                yield place, Score({}, reason=f"{len(ids)} tokens, more than the model's context of {self.context}")
                continue
            encoded[place] = ids
        order = sorted(encoded, key=lambda place: len(encoded[place]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for place, row in zip(batch, self._logits([encoded[place] for place in batch]), strict=True):
                yield place, Score.of(dict(zip(self.names, row, strict=True)))

    @torch.inference_mode()
    def _logits(self, rows: Sequence[np.ndarray]) -> list[list[float]]:
        """Decoders find a row's last token, whose output is the score, as the last that isn't config.pad_token_id; a
        model without that takes the row's last. Then any id does that ends no row of the batch.
        """
        own = self.config.pad_token_id
        ends = {int(row[-1]) for row in rows}
        pad = own if own in range(self.config.vocab_size) else next(i for i in range(len(rows) + 1) if i not in ends)
        ids = torch.full((len(rows), max(len(row) for row in rows)), pad)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.from_numpy(row).long()
            mask[place, : len(row)] = 1
        self.config.pad_token_id = pad
        try:
            logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
        finally:
            self.config.pad_token_id = own
        return logits.float().tolist()


class _ConversationEncoder:
    """A folder's own chat template and tokenizer. Raises ConfigError, which begins with `named`, where they can't be
    used.
    """

    def __init__(self, folder: Path, named: str) -> None:
        try:
            source = TokenizerSource.load(folder)
            self._template = ChatTemplate(source.template, dict(source.special_tokens))
        except DataError as error:
            raise ConfigError(f"{named}: {str(error).removeprefix('--tokenizer ')}") from error
        self._encoder = TextEncoder(Tokenizer.from_str(source.backend))
        probe = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self._template.render(probe, generation_prompt=False)
        except TemplateRefusal as error:
            raise ConfigError(f"{named}: its chat template fails on a plain question and answer ({error})") from error
        if _QUESTION not in text or _ANSWER not in text:
            raise ConfigError(f"{named}: its chat template leaves out the question or the answer")
        start = text.rindex(_ANSWER)
        self._encoder.settle(text[:start], [text[start:]])  # what follows a name's characters gets no space in front

    def encode(self, conversation: Sequence[Message]) -> np.ndarray:
        """Ids of a conversation, int32. Raises RecordProblem."""
        marked = [{"role": turn["role"], "content": self._encoder.mark(turn["content"])} for turn in conversation]
        try:
            return self._encoder.encode([self._template.render(marked, generation_prompt=False)])[0]
        except TemplateRefusal as error:
            raise RecordProblem("template_refused", str(error)) from error
