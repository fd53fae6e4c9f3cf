#!/usr/bin/env python3
"""Score a file of answers: a thin command line over `megatron_amopo.sampling.scorers`.

    score_answers.py answers.jsonl --scorer rules:examples/data/rules.py --output scores.jsonl
    score_answers.py answers.jsonl --scorer reward-model:DIR --output scores.jsonl
    score_answers.py answers.jsonl --scorer judge:http://localhost:8000/v1 --judge-model NAME --output scores.jsonl

Answers as `sample_answers.py` writes them; MT-bench's don't hold the questions, so --questions names their file. A
judge's key is read from the environment variable AMOPO_JUDGE_API_KEY. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_amopo.errors import ConfigError
from megatron_amopo.sampling.answered import Answered, read_answers
from megatron_amopo.sampling.prompt_files import PromptFile
from megatron_amopo.sampling.scorers.judge import Judge
from megatron_amopo.sampling.scorers.rules import Rules
from megatron_amopo.sampling.scorers.score import Score, Scorer, summaries
from megatron_amopo.sampling.scorers.score_file import score_file
from tools.command_line import exit_status

_REASONS_SHOWN = 5


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _run(options), interrupted="error: interrupted; the same command goes on from here")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("answers", type=Path, metavar="ANSWERS")
    add("--scorer", required=True, metavar="KIND:WHICH", help="rules:FILE.py, reward-model:DIR or judge:URL")
    add("--output", type=Path, required=True, metavar="FILE", help="scores as JSON lines")
    add("--force", action="store_true", help="replace an output that exists")
    add("--questions", type=Path, metavar="FILE", help="the prompt file, for answers that don't hold it")
    add("--batch-size", type=int, metavar="N", help="of a reward model (default: 8)")
    add("--judge-model", metavar="NAME", help="what the endpoint calls the model")
    add("--judge-timeout", type=float, metavar="S", help="seconds for one answer (default: 120)")
    add("--judge-concurrency", type=int, metavar="N", help="questions at a time (default: 4)")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.output.resolve() in {path.resolve() for path in (options.answers, options.questions) if path}:
        raise ConfigError(f"--output {options.output} is one of the inputs")
    if options.output.exists() and not options.force:
        raise ConfigError(f"--output {options.output} exists already; name another file, or --force")
    if not options.output.resolve().parent.is_dir():
        raise ConfigError(f"--output {options.output}: there is no folder {options.output.parent}")
    scorer = _scorer(options)
    answers = read_answers(options.answers, PromptFile.read(options.questions) if options.questions else None)
    _show(answers, score_file(scorer, answers, options.output, progress=True))
    return 0


def _scorer(options: argparse.Namespace) -> Scorer:
    kind, _, which = options.scorer.partition(":")
    kinds = {"rules", "reward-model", "judge"}
    if kind not in kinds or not which:
        raise ConfigError(f"--scorer {options.scorer}: rules:FILE.py, reward-model:DIR or judge:URL")
    of_judge = {
        "--judge-model": options.judge_model,
        "--judge-timeout": options.judge_timeout,
        "--judge-concurrency": options.judge_concurrency,
    }
    for flag, value in ({} if kind == "judge" else of_judge).items():
        if value is not None:
            raise ConfigError(f"{flag} is of --scorer judge:URL")
    if options.batch_size is not None and kind != "reward-model":
        raise ConfigError("--batch-size is of --scorer reward-model:DIR")
    for flag, value in {"--batch-size": options.batch_size, **of_judge}.items():
        if isinstance(value, int | float) and value <= 0:
            raise ConfigError(f"{flag} {value}: more than 0")
    if kind == "rules":
        return Rules(Path(which))
    if kind == "reward-model":
        from megatron_amopo.sampling.scorers.reward_model import RewardModel

        return RewardModel(Path(which), options.batch_size or 8)
    if options.judge_model is None:
        raise ConfigError("--scorer judge:URL needs --judge-model")
    return Judge(
        which,
        options.judge_model,
        timeout_s=options.judge_timeout or 120.0,
        at_a_time=options.judge_concurrency or 4,
    )


def _show(answers: Sequence[Answered], scores: Sequence[Score]) -> None:
    lacking = [(answered, score.reason) for answered, score in zip(answers, scores, strict=True) if score.reason]
    table = Table(title=f"{len(answers)} answers" + (f", {len(lacking)} of them without a score" if lacking else ""))
    table.add_column("score")
    for title in ("answers", "mean", "std", "lowest", "highest"):
        table.add_column(title, justify="right")
    for row in summaries(scores):
        numbers = (row.mean, row.deviation, row.lowest, row.highest)
        table.add_row(Text(row.name), str(row.count), *(f"{number:.3f}" for number in numbers))
    Console().print(table)
    for answered, reason in lacking[:_REASONS_SHOWN]:
        print(f"no score: {answered.where}, turn {answered.turn}: {reason}")
    if len(lacking) > _REASONS_SHOWN:
        print(f"no score: {len(lacking) - _REASONS_SHOWN} more; the output says why of each")


if __name__ == "__main__":
    sys.exit(main())
