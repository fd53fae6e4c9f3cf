"""Scores of all answers of a file, kept as they come, and written when all are there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from megatron_amopo.sampling.answered import Answered
from megatron_amopo.sampling.scorers.score import Score, Scorer
from megatron_amopo.sampling.unfinished import Unfinished


def score_file(scorer: Scorer, answers: Sequence[Answered], output: Path, *, progress: bool = False) -> list[Score]:
    """Score every answer and write `output`; those that a run before has scored aren't scored again.

    Raises:
        AmopoError: the scorer fails, or an unfinished output of other answers or of another scorer is there.
    """
    asked = {"answers_sha256": hashlib.sha256(repr(answers).encode()).hexdigest(), "scorer": dict(scorer.identity)}
    unfinished = Unfinished(output, asked)
    left = [place for place in range(len(answers)) if str(place) not in unfinished.found]
    total, before = len(answers), len(answers) - len(left)
    with tqdm(total=total, initial=before, unit="answer", disable=not progress) as bar:
        for number, score in scorer.score([answers[place] for place in left]):
            unfinished.add({str(left[number]): asdict(score)})
            bar.update()
    scores = [Score(**unfinished.found[str(place)]) for place in range(len(answers))]
    _write(output, answers, scores)
    unfinished.remove()
    return scores


def _write(path: Path, answers: Sequence[Answered], scores: Sequence[Score]) -> None:
    lines = []
    for answered, score in zip(answers, scores, strict=True):
        more = {name: text for name, text in (("said", score.said), ("reason", score.reason)) if text is not None}
        lines.append({"id": answered.id, "turn": answered.turn, "scores": dict(score.scores), **more})
    beside = path.with_name(f".{path.name}.new")
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
