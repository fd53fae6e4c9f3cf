"""Does optimising several objectives at once pay? All methods on one task whose qualities conflict, at equal compute.

    python -m benchmarks.efficacy --output runs/efficacy

Trains every arm of ``arms.py`` at two sizes under several seeds, lets the models answer held-out requests, scores the
answers by rule, and writes a page with a table, plots with 95 % intervals and a verdict on each published claim.
Resumable: a call does what isn't there yet. It needs two cores and no GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and report what is there; exit status 3 where runs are left to do."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.efficacy", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the study; a second call goes on in it")
    add("--minutes", type=float, metavar="N", help="stop before N minutes are over; call again to go on")
    add("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    add("--report-only", action="store_true", help="run nothing, write the report from the runs that are there")
    add("--results", type=Path, metavar="DIR", help="folder of the report (default: OUTPUT/report)")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be at least 1")

    from benchmarks.efficacy.report import write_report
    from benchmarks.efficacy.schedule import all_jobs, claim_folder, work
    from megatron_amopo.errors import ConfigError

    output = options.output.resolve()
    if options.report_only and not (output / "study.json").is_file():
        parser.error(f"--report-only: there is no study at {options.output}")
    try:
        claim_folder(output)
    except ConfigError as error:
        parser.error(str(error))
    left = 0
    if not options.report_only:
        progress = work(all_jobs(output), workers=options.workers, minutes=options.minutes)
        left = progress.left
        hours = progress.seconds_left / options.workers / 3600
        print(
            f"{progress.finished} of {progress.finished + left} jobs are done"
            + (f"; {left} are left, about {hours:.1f} h with {options.workers} workers: call again" if left else "")
        )
    print(write_report(output, options.results or output / "report"))
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
