"""The report page: one HTML file that needs nothing beside it.

Takes a run's folder and, where it is known, the folder of its prepared data; gives the page's text. What a run didn't
record is left out, with a line that says which flag records it. Everything that comes from files is escaped.
"""

from pathlib import Path

from megatron_amopo import __version__
from megatron_amopo.report import figures, summary, tables
from megatron_amopo.report.files import ReportError, read_text, write_text
from megatron_amopo.report.ledger import summarise_ledger
from megatron_amopo.report.prepared import find_data
from megatron_amopo.report.rendering import render
from megatron_amopo.report.run import Run
from megatron_amopo.report.words import percent
from megatron_amopo.training.run_files import LEDGER_FOLDER

#: What only a page of ours holds, and every one.
_MARK = '<p class="lead">Training report</p>'


def write_page(path: Path, folder: Path, data_folder: Path | None = None) -> None:
    """Write the page of a run; ``folder`` and ``data_folder`` as :func:`render_page` takes them.

    Raises:
        ReportError: ``path`` is there and isn't a page (the run's metrics, for one), or a folder isn't what it must be.
    """
    if path.exists() and not (path.is_file() and _MARK in read_text(path)):
        raise ReportError(f"--output {path} is there and isn't a page of this tool: it isn't replaced")
    write_text(path, render_page(folder, data_folder))


def render_page(folder: Path, data_folder: Path | None = None) -> str:
    """The page of a run.

    Args:
        folder: the run's ``--save`` folder.
        data_folder: of its prepared data; None for the one that the run recorded, if it is still there.

    Raises:
        ReportError: a folder isn't a run's or its data, or a file in it is damaged.
    """
    run = Run.load(folder)
    data = find_data(run, data_folder)
    ledger = summarise_ledger(folder / LEDGER_FOLDER, run.dimensions)
    records = summary.validation_records(data)
    has_floors = bool(run.flags.get("--amopo-margin-floor"))
    return render(
        "page.html.jinja",
        {"percent": percent},
        run=run,
        data=data,
        version=__version__,
        facts=summary.facts(run, data),
        warnings=summary.warnings(run),
        results=tables.results_table(summary.results(run, records), with_floors=has_floors),
        results_are=summary.results_are(run, records),
        has_floors=has_floors,
        legend=figures.dimension_legend(run.dimensions),
        smoothing=figures.smoothing(run),
        dimension_plots=figures.dimension_plots(run),
        course_plots=figures.course_plots(run),
        conflict_plots=figures.conflict_plots(run),
        leakage_plots=figures.leakage_plots(run),
        leakage_records=figures.leakage_records(run),
        ledger=ledger,
        ledger_table=tables.ledger_table(ledger) if ledger else None,
        ledger_plots=figures.ledger_plots(ledger) if ledger else [],
        ledger_legend=figures.dimension_legend([one.name for one in ledger.dimensions]) if ledger else (),
        contradicted=tables.contradicted_table(ledger) if ledger else None,
        preparation_tables=tables.preparation_tables(data),
        lengths=tables.lengths_table(data) if data else None,
        flags=tables.flags_table(run),
        starts=tables.starts_table(run),
        settings=tables.main_arguments_table(run),
        arguments=tables.arguments_table(run),
    )
