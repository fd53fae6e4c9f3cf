#!/usr/bin/env python3
"""Certify that one result comes out under every layout.

    certify.py                                   all layouts that this machine can run
    certify.py --layouts tp2,pp2-dp2             some of them
    certify.py --list                            their names and flags

A tiny random model is trained under each layout and compared with one rank and with the published objective written in
plain torch; --output gets certificate.md and certificate.json.

Exit codes: 0 all within the tolerance, 1 a layout exceeds it, 2 an error: of the command line, or a layout that could
not be computed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron_amopo.certification.certify import Job, OpenPool, Outcome, certify
from megatron_amopo.certification.comparison import Errors
from megatron_amopo.certification.layouts import LAYOUTS, Layout
from megatron_amopo.certification.observed_run import train
from megatron_amopo.certification.ranks import RankPool
from megatron_amopo.certification.report import MARKDOWN, environment, write_certificate
from megatron_amopo.errors import ConfigError
from tools.command_line import exit_status


def main(arguments: Sequence[str] | None = None, *, open_pool: OpenPool = RankPool, job: Job = train) -> int:
    """The command line; ``open_pool`` and ``job`` as :func:`certify` takes them."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    if options.list:
        for layout in LAYOUTS:
            print(f"{layout.name:42} {layout.ranks} rank(s)  {' '.join(layout.flags)}")
        return 0
    command = shlex.join(["tools/certify.py", *arguments])
    return exit_status(lambda: _run(options, command, open_pool, job))


def _run(options: argparse.Namespace, command: str, open_pool: OpenPool, job: Job) -> int:
    layouts, left_out = _choose(options.layouts, torch.cuda.device_count())
    _make_folder(options.output)
    outcomes = certify(layouts, steps=options.steps, tolerance=options.tolerance, open_pool=open_pool, job=job)
    about = environment(command=command, steps=options.steps, tolerance=options.tolerance)
    write_certificate(options.output, outcomes, about, left_out)
    return _say(outcomes, options.output)


def _choose(names: str | None, num_gpus: int) -> tuple[list[Layout], dict[str, str]]:
    """The layouts to run, and those that are left out with the reason.

    Raises:
        ConfigError: a name that isn't there, or a named layout that this machine can't run.
    """
    lacking = {
        layout.name: f"needs {layout.ranks} GPU(s), here are {num_gpus}"
        for layout in LAYOUTS
        if layout.gpus and layout.ranks > num_gpus
    }
    if names is None:
        return [layout for layout in LAYOUTS if layout.name not in lacking], lacking
    by_name = {layout.name: layout for layout in LAYOUTS}
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in by_name:
            raise ConfigError(f"--layouts: there is no '{name}'; --list names them all")
        if name in lacking:
            raise ConfigError(f"--layouts: {name} {lacking[name]}")
    if not chosen:
        raise ConfigError("--layouts names none")
    return [by_name[name] for name in chosen], {}


def _make_folder(folder: Path) -> None:
    """Before minutes are spent, rather than after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: can't be made ({error.strerror})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layouts", metavar="A,B,…", help="which ones (default: all that this machine can run)")
    add("--list", action="store_true", help="name the layouts and stop")
    add(
        "--output",
        type=Path,
        default=Path("runs/certificate"),
        metavar="DIR",
        help="where the certificate goes (default: %(default)s)",
    )
    add("--steps", type=_count, default=5, metavar="N", help="updates of each run (default: %(default)s)")
    add(
        "--tolerance",
        type=_positive,
        default=1e-5,
        metavar="X",
        help="largest relative error in float32 (default: %(default)s)",
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _say(outcomes: Sequence[Outcome], output: Path) -> int:
    """Print what came out, and give the exit code."""
    for outcome in outcomes:
        if outcome.failure is not None:
            print(f"{outcome.layout.name}: not computed\n{outcome.failure}", file=sys.stderr)
        elif outcome.exceeded:
            print(f"{outcome.layout.name}: {', '.join(outcome.exceeded)} above the tolerance", file=sys.stderr)
    for precision, bf16 in (("float32", False), ("bf16", True)):
        errors = [outcome.worst for outcome in outcomes if outcome.layout.bf16 == bf16 and outcome.worst is not None]
        if errors:
            worst = reduce(Errors.worst_of, errors)
            print(
                f"Largest relative errors in {precision}: losses {worst.loss:.1e}, gradients {worst.grad:.1e}, weights "
                f"{worst.weight:.1e}, losses with Adam {worst.adam_loss:.1e}"
            )
    print(f"{sum(outcome.passed for outcome in outcomes)} of {len(outcomes)} layouts passed: {output / MARKDOWN}")
    if any(outcome.failure is not None for outcome in outcomes):
        return 2
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
