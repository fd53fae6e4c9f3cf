"""From a run's scored answers to the figures that arms are compared by.

Takes the files of finished runs; gives :class:`Outcomes` by size, arm and seed, and paired comparisons of arms.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.efficacy.arms import ARMS, ARROWS, SEEDS, SIZES, START, Arrow
from benchmarks.efficacy.runs import from_digits, run_file
from benchmarks.efficacy.sampling import LEVELS
from benchmarks.efficacy.statistics import Estimate, estimate, holm, hypervolume
from benchmarks.efficacy.task import HIGHEST, LOWEST

ARM_NAMES = (START, *(arm.name for arm in ARMS))
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Outcomes:
    """A finished run."""

    facts: Mapping[str, Any]  # its file

    @cached_property
    def general(self) -> np.ndarray:
        """Scores ``[requests, K]`` of answers under the general prompt, 1-5."""
        return from_digits(self.facts["general"])

    @cached_property
    def asked(self) -> np.ndarray:
        """Scores ``[K, levels, requests, K]`` of answers that dimension k's prompt asks to be worth a level."""
        return from_digits(self.facts["asked"])

    @property
    def means(self) -> np.ndarray:
        """Mean score of each dimension under the general prompt."""
        return self.general.mean(axis=0)

    @property
    def mean(self) -> float:
        """Mean score over dimensions."""
        return float(self.general.mean())

    @property
    def worst(self) -> float:
        """The lowest of the dimensions' mean scores."""
        return float(self.means.min())

    @cached_property
    def volume(self) -> float:
        """Hypervolume that the model reaches with its sixteen prompts: the share of all mean scores, each dimension's
        1-5 as 0-1, that some prompt's mean scores are at least as good as.
        """
        return _volume(self.general, self.asked)

    @cached_property
    def volume_of_halves(self) -> float:
        """The mean of the hypervolumes that each half of the answers gives alone: higher by what noise adds."""
        parts = (slice(None, None, 2), slice(1, None, 2))
        return float(np.mean([_volume(self.general[part], self.asked[:, :, part]) for part in parts]))

    @cached_property
    def obeyed(self) -> np.ndarray:
        """Scores ``[K, levels, requests]`` on the dimension that was asked about."""
        return np.stack([self.asked[k, ..., k] for k in range(len(self.asked))])

    @property
    def slope(self) -> float:
        """Points by which the measured score rises with each point that is asked for, by least squares; mean over
        dimensions. 1 is what was asked, 0 is no effect.
        """
        centred = np.array(LEVELS) - np.mean(LEVELS)
        return float((self.obeyed.mean(axis=2) @ centred / (centred @ centred)).mean())

    @property
    def error(self) -> float:
        """Mean distance of an answer's score from the score that was asked for, in points."""
        return float(np.abs(self.obeyed - np.array(LEVELS)[:, None]).mean())

    def wins_against(self, other: "Outcomes") -> float:
        """Share of requests on which the total score is higher than another run's, ties as half."""
        ours, theirs = self.general.sum(axis=1, dtype=int), other.general.sum(axis=1, dtype=int)
        return float((ours > theirs).mean() + (ours == theirs).mean() / 2)


def _volume(general: np.ndarray, asked: np.ndarray) -> float:
    points = np.concatenate([general.mean(axis=0)[None], asked.mean(axis=2).reshape(-1, asked.shape[-1])])
    return hypervolume((points - LOWEST) / (HIGHEST - LOWEST))


Figure = Callable[[Outcomes], float]


@dataclass(frozen=True)
class Study:
    """All finished runs, by (size, arm, seed)."""

    runs: Mapping[tuple[str, str, int], Outcomes]

    @classmethod
    def load(cls, output: Path) -> "Study":
        """Read what is there."""
        keys = [(size.name, arm, seed) for size in SIZES for arm in ARM_NAMES for seed in SEEDS]
        files = {key: run_file(output, *key) for key in keys}
        return cls(
            {
                key: Outcomes(json.loads(path.read_text(encoding="utf-8")))
                for key, path in files.items()
                if path.exists()
            }
        )

    @property
    def expected(self) -> int:
        """Runs of the whole study."""
        return len(SIZES) * len(ARM_NAMES) * len(SEEDS)

    @property
    def sizes(self) -> list[str]:
        """Those that have runs."""
        return [size.name for size in SIZES if any(key[0] == size.name for key in self.runs)]

    def seeds(self, size: str, *arms: str) -> list[int]:
        """Seeds under which all of some arms are finished."""
        return [seed for seed in SEEDS if all((size, arm, seed) in self.runs for arm in arms)]

    def figure(self, size: str, arm: str, figure: Figure) -> Estimate | None:
        """An arm's figure, mean over its seeds; None without a run."""
        values = [figure(self.runs[size, arm, seed]) for seed in self.seeds(size, arm)]
        return estimate(values) if values else None

    def wins(self, size: str, arm: str, other: str) -> Estimate | None:
        """An arm's share of won requests against another of the same seed, less one half: 0 is a draw."""
        seeds = self.seeds(size, arm, other)
        shares = [self.runs[size, arm, seed].wins_against(self.runs[size, other, seed]) - 0.5 for seed in seeds]
        return estimate(shares) if shares else None

    def compares(self, arrow: Arrow, *sizes: str) -> bool:
        """Whether every planned run of both arms is in at some sizes. A verdict waits for them: looking again after
        every seed would find what isn't there.
        """
        return all(self.seeds(size, arrow.better, arrow.worse) == list(SEEDS) for size in sizes)

    def compared_sizes(self, arrow: Arrow) -> list[str]:
        """Those at which both arms have runs of a seed."""
        return [size for size in self.sizes if self.seeds(size, arrow.better, arrow.worse)]

    def difference(self, arrow: Arrow, figure: Figure, sizes: Sequence[str]) -> Estimate | None:
        """``better`` − ``worse``, paired within seeds. Over several sizes a seed counts with their mean, once, as its
        data is the same; None where no seed has all.
        """
        if not sizes:
            return None
        seeds = [s for s in SEEDS if all(s in self.seeds(size, arrow.better, arrow.worse) for size in sizes)]

        def at(size: str, seed: int) -> float:
            return figure(self.runs[size, arrow.better, seed]) - figure(self.runs[size, arrow.worse, seed])

        values = [float(np.mean([at(size, seed) for size in sizes])) for seed in seeds]
        return estimate(values) if values else None


@dataclass(frozen=True)
class Verdict:
    """What one size, or all sizes together, say of a claimed arrow, by the mean score."""

    arrow: Arrow
    sizes: Sequence[str]
    estimate: Estimate | None  # from what is there
    p: float  # adjusted by Holm over all arrows; NaN while runs are missing

    @property
    def word(self) -> str:
        """``holds``, ``fails`` (the opposite is found), ``not decided at this size``, or ``too early``."""
        if self.estimate is None or math.isnan(self.p):
            return "too early"
        if self.p >= SIGNIFICANT:
            return "not decided at this size" if len(self.sizes) == 1 else "not decided at these sizes"
        return "holds" if self.estimate.mean > 0 else "fails"


def verdicts(study: Study, *sizes: str) -> list[Verdict]:
    """A verdict on every claimed arrow, from one size or several together. Those for which it is too early count in the
    adjustment all the same.
    """
    found = [study.difference(arrow, lambda run: run.mean, sizes) for arrow in ARROWS]
    complete = [study.compares(arrow, *sizes) for arrow in ARROWS]
    p_values = [each.p if all_in and each is not None else 1.0 for each, all_in in zip(found, complete, strict=True)]
    return [
        Verdict(arrow, sizes, each, p if all_in else math.nan)
        for arrow, each, all_in, p in zip(ARROWS, found, complete, holm(p_values), strict=True)
    ]
