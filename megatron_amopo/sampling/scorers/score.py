"""What every scorer gives, and what all scores of a file amount to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_amopo.sampling.answered import Answered


@dataclass(frozen=True)
class Score:
    """Scores of one answer, by name. Where some or all are lacking, `reason` says why; `said` is what a judge wrote."""

    scores: Mapping[str, float]
    said: str | None = None
    reason: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Score:
        """Those of the values that are finite numbers: JSON has no others, and a mean of others says nothing."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        others = [f"{name} is {value}" for name, value in values.items() if name not in finite]
        return cls(finite, reason=", ".join(others) or (None if finite else "the scorer gave none"))


class Scorer(Protocol):
    """`identity` are the settings that scores depend on, as JSON holds them: with others they can't be taken up."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, Score]]:
        """Each answer's place in `answers` and its score, in any order, as soon as it is there."""


@dataclass(frozen=True)
class Summary:
    """Of all answers' scores of one name; `deviation` is that of a sample, nan for one answer."""

    name: str
    count: int
    mean: float
    deviation: float
    lowest: float
    highest: float


def summaries(scores: Sequence[Score]) -> list[Summary]:
    """One for each name, in the order in which names appear."""
    found: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.scores.items():
            found.setdefault(name, []).append(value)
    rows = []
    for name, values in found.items():
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan
        rows.append(Summary(name, len(values), mean, deviation, min(values), max(values)))
    return rows
