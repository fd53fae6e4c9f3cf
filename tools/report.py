#!/usr/bin/env python3
"""One page of a training run, and the model card of its export: a thin command line over `megatron_amopo.report`.

tools/report.py RUN_DIR                                  # report.html in the run's folder
tools/report.py RUN_DIR --data DATA_DIR --output a.html
tools/report.py RUN_DIR --model-card MODEL_DIR           # README.md in an exported folder
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.command_line import exit_status


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="a run's --save folder; the run may be going on")
    add("--output", type=Path, metavar="FILE", help="replaces a page, nothing else (default: RUN_DIR/report.html)")
    add("--data", type=Path, metavar="DIR", help="the run's prepared data (default: where the run read it)")
    add("--model-card", type=Path, metavar="DIR", help="write README.md into this exported model instead of the page")
    add("--base-model", metavar="ORG/NAME", help="for the card: the hub's name of the model that training began with")
    add("--force", action="store_true", help="let the card replace a README.md that this tool didn't write")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, or 2 for errors meant for people."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.model_card is None and (options.base_model is not None or options.force):
        parser.error("--base-model and --force are of --model-card")
    if options.model_card is not None and options.output is not None:
        parser.error("--output is of the page; --model-card writes README.md into its folder")
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.model_card is not None:
        from megatron_amopo.report.card import write_card

        path = write_card(options.run, options.model_card, options.data, options.base_model, force=options.force)
    else:
        from megatron_amopo.report.page import write_page

        path = options.output or options.run / "report.html"
        write_page(path, options.run, options.data)
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
