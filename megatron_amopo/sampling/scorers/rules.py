"""Scores by rule: a Python file with the function

    def score_answer(prompt: str, answer: str) -> Mapping[str, float]

which gets the user's turn and the answer to it, and gives scores by name. The file is run: name only what you trust.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_amopo.errors import ConfigError, DataError
from megatron_amopo.sampling.answered import Answered
from megatron_amopo.sampling.scorers.score import Score

FUNCTION = "score_answer"


class Rules:
    """A file's function, loaded."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where there is no such file or function."""
        name = f"amopo_rules_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path) if path.is_file() else None
        if spec is None or spec.loader is None:
            raise ConfigError(f"--scorer rules:{path}: no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses of the file look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the file does wrong
            raise ConfigError(f"--scorer rules:{path}: fails to load ({error!r})") from error
        self.path = path
        function = getattr(module, FUNCTION, None)
        if not callable(function):
            raise ConfigError(f"--scorer rules:{path}: has no function {FUNCTION}(prompt, answer)")
        self.function = function
        self.identity = {"rules": hashlib.sha256(path.read_bytes()).hexdigest()}

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, Score]]:
        """In order. Raises DataError naming the answer on which the rules fail."""
        for place, each in enumerate(answers):
            try:
                found = {str(name): float(value) for name, value in self.function(each.prompt, each.answer).items()}
            except Exception as error:  # the rules' own
                raise DataError(
                    f"{self.path} fails on the answer to {each.id!r} ({each.where}), turn {each.turn}: {error!r}"
                ) from error
            yield place, Score.of(found)
