"""What the sampler asks of whatever computes answers: token ids in, token ids out, one seed for each answer.

A seed belongs to an answer and not to a batch, so that an answer depends neither on its neighbours nor on where a
resumed run went on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_amopo.errors import DataError


@dataclass(frozen=True)
class Request:
    """A prompt's ids, int32, and how to answer it. `question` is for messages. Temperature 0 is greedy."""

    question: str
    prompt: np.ndarray
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Generated:
    """Ids of an answer without the token that ended it; `ended` says that there was one before the limit."""

    ids: tuple[int, ...]
    ended: bool


class Engine(Protocol):
    """`batch_size` is how many requests it wants at a time."""

    name: str
    batch_size: int

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """Answer each request."""


def room(request: Request, context: int | None) -> int:
    """How many tokens an answer may have, in a context of so many (None: of any). Raises DataError where the prompt
    leaves no room for one.
    """
    if context is None:
        return request.max_tokens
    if len(request.prompt) >= context:
        raise DataError(
            f"question {request.question!r}: its prompt of {len(request.prompt)} tokens, earlier turns included, "
            f"fills the model's context of {context}"
        )
    return min(request.max_tokens, context - len(request.prompt))


def answer_seed(seed: int, question: str, turn: int) -> int:
    """The seed of one answer, from the run's."""
    digest = hashlib.sha256(f"{seed}\n{turn}\n{question}".encode()).digest()
    return int.from_bytes(digest[:4], "big") // 2  # 31 bits: every generator takes that
