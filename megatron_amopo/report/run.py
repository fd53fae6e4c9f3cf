"""A run as its folder tells it: metrics, evaluations, configuration, starts.

Takes the ``--save`` folder, of a run that ended, was stopped or is going on; gives a :class:`Run`. Every file may be
missing but one: a folder without any of them isn't a run's.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_amopo.report.files import JsonLines, ReportError, read_json_lines, read_json_object
from megatron_amopo.training.run_files import EVALUATION_FILE, METRICS_FILE, RUN_RECORD, STARTS_FILE

_TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's
#: The starting model's files without its weights.
MODEL_FOLDER = "hf"
_MODEL = f"{MODEL_FOLDER}/config.json"


@dataclass(frozen=True)
class Line:
    """Figures of one step, by name; what isn't a number is NaN. A bad step says its reason."""

    step: int
    metrics: Mapping[str, float]
    reason: str = ""


@dataclass(frozen=True)
class Series:
    """One figure over steps: ``steps`` int [N], ``values`` float [N], NaN where a line lacks it."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, lines: Iterable[Line], name: str) -> "Series":
        """The figure ``name`` of those lines that have it."""
        having = [(line.step, line.metrics[name]) for line in lines if name in line.metrics]
        return cls(np.array([step for step, _ in having], int), np.array([value for _, value in having], float))

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Start:
    """One start of the run, or its resumption after ``step``."""

    step: Any
    time: Any
    ranks: Any
    device: Any
    versions: Mapping[str, Any]
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Start":
        """A line of the file; what it lacks is None or empty."""
        versions, arguments = (line.get(name) for name in ("versions", "arguments"))
        return cls(
            step=line.get("step"),
            time=line.get("time"),
            ranks=line.get("ranks"),
            device=line.get("device"),
            versions=versions if isinstance(versions, dict) else {},
            arguments=arguments if isinstance(arguments, dict) else {},
        )


@dataclass(frozen=True)
class Run:
    """What a folder holds. ``flags`` are run.json's, by flag."""

    folder: Path
    flags: Mapping[str, Any]
    training: tuple[Line, ...]
    evaluations: tuple[Line, ...]
    conflicts: tuple[Line, ...]
    bad_steps: tuple[Line, ...]  # which left the weights as they were
    evaluated_alone: Line | None  # of a later start with --skip-train
    starts: tuple[Start, ...]
    model: Mapping[str, Any]  # its Hugging Face config; empty before the first checkpoint
    saved_step: int | None
    cut_off: tuple[str, ...]  # files that end in half a line

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Read a folder.

        Raises:
            ReportError: it isn't there, isn't a run's, or a file in it is damaged; the message names it.
        """
        if not folder.is_dir():
            raise ReportError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
        flags = read_json_object(folder / RUN_RECORD)
        metrics, alone = folder / METRICS_FILE, folder / EVALUATION_FILE
        if flags is None and not metrics.is_file() and not alone.is_file():
            raise ReportError(
                f"{folder} holds none of {METRICS_FILE}, {EVALUATION_FILE} and {RUN_RECORD}: not a run's --save folder"
            )
        files = {path.name: read_json_lines(path) for path in (metrics, alone, folder / STARTS_FILE)}
        lines = _lines(metrics, files[METRICS_FILE])
        evaluated_alone = _lines(alone, files[EVALUATION_FILE]).get("validation", ())
        return cls(
            folder=folder,
            flags=flags or {},
            training=lines.get("train", ()),
            evaluations=lines.get("validation", ()),
            conflicts=lines.get("conflict", ()),
            bad_steps=lines.get("bad_step", ()),
            evaluated_alone=evaluated_alone[-1] if evaluated_alone else None,
            starts=tuple(Start.of(line) for line in files[STARTS_FILE].objects),
            model=read_json_object(folder / _MODEL) or {},
            saved_step=_saved_step(folder / _TRACKER),
            cut_off=tuple(name for name, found in files.items() if found.cut_off),
        )

    @cached_property
    def dimensions(self) -> tuple[str, ...]:
        """The trained dimensions, in their order."""
        named = self.flags.get("--amopo-dimensions")
        if isinstance(named, list):
            return tuple(str(name) for name in named)
        lines = (*self.training, *self.evaluations, *((self.evaluated_alone,) if self.evaluated_alone else ()))
        found = {name.partition("/")[2]: None for line in lines for name in line.metrics if name.startswith("margin/")}
        return tuple(found)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        """The last step that was logged or saved; 0 before the first."""
        logged = (line.step for line in (*self.training, *self.evaluations))
        return max((*logged, self.saved_step or 0), default=0)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """All flags of the last start, by Megatron's names; empty where they weren't recorded."""
        return self.starts[-1].arguments if self.starts else {}

    @property
    def total_steps(self) -> int | None:
        """How many steps were planned; None where that isn't recorded."""
        planned = self.arguments.get("train_iters")
        return planned if isinstance(planned, int) else None

    @property
    def before(self) -> Line | None:
        """The first evaluation."""
        return self.evaluations[0] if self.evaluations else None

    @property
    def after(self) -> Line | None:
        """The last evaluation, if it isn't the first."""
        return self.evaluations[-1] if len(self.evaluations) > 1 else None

    @cached_property
    def not_finite(self) -> tuple[str, int] | None:
        """The first figure that isn't a finite number, and its step."""
        for line in sorted((*self.training, *self.evaluations), key=lambda line: line.step):
            for name, value in line.metrics.items():
                if not math.isfinite(value):
                    return name, line.step
        return None


def _lines(path: Path, found: JsonLines) -> dict[str, tuple[Line, ...]]:
    """What was found in a metrics file by split, each in the order of steps."""
    splits: dict[str, list[Line]] = {}
    for number, content in enumerate(found.objects, start=1):
        try:
            figures = {str(name): _number(value) for name, value in content["metrics"].items()}
            line = Line(int(content["iteration"]), figures, str(content.get("reason", "")))
            splits.setdefault(str(content["split"]), []).append(line)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(f"{path}, line {number}: not a line of metrics ({error!r})") from error
    return {split: tuple(sorted(lines, key=lambda line: line.step)) for split, lines in splits.items()}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _saved_step(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
