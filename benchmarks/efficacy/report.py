"""The study's page: verdicts, tables and plots, from the runs that are there.

Takes the study's folder; writes ``README.md``, ``results.json`` and plots. A study that isn't finished says so first.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.efficacy import conditions, plots
from benchmarks.efficacy.arms import AMOPO, ARROWS, ASKED_REQUESTS, BY_NAME, SEEDS, SIMPO, SIZES, START, Arrow
from benchmarks.efficacy.outcomes import ARM_NAMES, Figure, Outcomes, Study, Verdict, verdicts
from benchmarks.efficacy.statistics import Estimate
from benchmarks.efficacy.task import DIMENSIONS
from benchmarks.support import markdown_table, write_results

COMMAND = "python -m benchmarks.efficacy --output runs/efficacy"
TITLE = "What optimising several objectives at once buys"

_NAMES = tuple(size.name for size in SIZES)
#: What verdicts are given on: the sizes together, the rule that the runs were begun under, and each by itself.
VERDICTS = (_NAMES, *((name,) for name in _NAMES))
FIGURES: Mapping[str, Figure] = {
    "mean": lambda run: run.mean,
    "worst": lambda run: run.worst,
    "hypervolume": lambda run: run.volume,
}
#: Comparisons that no published claim is about: what a part of the method does, and what many prompts add to a loss.
FURTHER = (
    Arrow(AMOPO, "mean"),
    Arrow(AMOPO, "plain"),
    Arrow(AMOPO, "no-score"),
    Arrow(AMOPO, "three"),
    Arrow(AMOPO, "two"),
    Arrow("amopo-orpo", "orpo"),
    Arrow("amopo-dpo", "dpo"),
    Arrow(AMOPO, "ipo"),
    Arrow(AMOPO, "sft"),
    Arrow(AMOPO, START),
    Arrow(SIMPO, START),
)


def write_report(output: Path, results: Path) -> str:
    """Write the page; gives its verdicts in words."""
    study = Study.load(output)
    if not study.runs:
        return "no run is finished yet: nothing to report"
    found = [verdict for sizes in VERDICTS for verdict in verdicts(study, *sizes)]
    said = "\n".join(f"{' and '.join(each.sizes)}: {claim(each.arrow)}: {each.word}" for each in found)
    sections = (
        _status(study),
        _verdicts(study, found),
        *(_outcomes(study, size) for size in study.sizes),
        _further(study),
        _asked(study),
        conditions.compute(study),
        conditions.tuning(output),
        conditions.tuned_and_tested(output, study),
        conditions.method(output, study),
    )
    write_results(
        results,
        title=TITLE,
        command=COMMAND,
        text="\n".join(sections),
        data=_data(output, study, found),
        figures=plots.all_plots(study),
    )
    return f"{said}\n{results / 'README.md'}"


def title_of(arm: str) -> str:
    """An arm in words."""
    return "start" if arm == START else BY_NAME[arm].title


def claim(arrow: Arrow) -> str:
    """An arrow in words."""
    return f"{title_of(arrow.better)} > {title_of(arrow.worse)}"


def interval(found: Estimate | None, form: str = ".2f") -> str:
    """``mean (low to high)``."""
    if found is None:
        return "–"
    if math.isnan(found.low):
        return f"{found.mean:{form}} (one seed)"
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def _status(study: Study) -> str:
    complete = {size: len(study.seeds(size, *ARM_NAMES)) for size in (each.name for each in SIZES)}
    numbers = ", ".join(f"{count} of {len(SEEDS)} seeds at the {size} size" for size, count in complete.items())
    commits = sorted({run.facts["code"] for run in study.runs.values()})
    code = f"The runs are of commit{'s' * (len(commits) > 1)} {', '.join(commits)}.\n"
    if len(study.runs) == study.expected:
        return f"All {study.expected} runs are in: {numbers}. {code}"
    return (
        f"**This is a part of the study: {len(study.runs)} of {study.expected} runs are in; all methods are finished "
        f"on {numbers}.** What it says may change. {code}"
    )


def _verdicts(study: Study, found: Sequence[Verdict]) -> str:
    def p_value(verdict: Verdict) -> str:
        return "–" if math.isnan(verdict.p) else f"{verdict.p:.3f}" if verdict.p >= 0.001 else "< 0.001"

    rows = []
    for arrow in ARROWS:
        cells = [
            (f"**{verdict.word}**", interval(verdict.estimate, "+.2f"), p_value(verdict))
            for verdict in found
            if verdict.arrow == arrow
        ]
        rows.append([claim(arrow), *chain.from_iterable(cells)])
    groups = [" and ".join(sizes) for sizes in VERDICTS]
    header = ["claim", *chain.from_iterable((f"{group}: verdict", "difference", "p (Holm)") for group in groups)]
    return f"""## Verdicts

Differences of the mean score (1–5, over {", ".join(DIMENSIONS)}) of answers under the general prompt, with 95 %
intervals. *Holds*: p < 0.05 after Holm's adjustment over the {len(ARROWS)} claims, in the claimed direction; *fails*:
the same in the opposite direction; otherwise *not decided*, and the interval says how large an advantage there may
still be. Until all {len(SEEDS)} planned runs of both methods are in it is *too early*: no verdict is taken from a part.

The verdict over {groups[0]} together is the one that the runs were begun for. Those of each size by itself were added
after the small size had been run: they come on top and don't replace it.

{markdown_table(header, rows)}"""


def _outcomes(study: Study, size: str) -> str:
    rows = []
    for arm in ARM_NAMES:
        seeds = study.seeds(size, arm)
        if not seeds:
            continue
        means = np.mean([study.runs[size, arm, seed].means for seed in seeds], axis=0)
        rows.append(
            [
                title_of(arm),
                len(seeds),
                interval(study.figure(size, arm, FIGURES["mean"])),
                *(f"{mean:.2f}" for mean in means),
                interval(study.figure(size, arm, FIGURES["worst"])),
                interval(study.figure(size, arm, FIGURES["hypervolume"]), ".3f"),
                _share(study, size, arm, START),
                _share(study, size, arm, AMOPO),
            ]
        )
    header = [
        *("method", "seeds", "mean", *DIMENSIONS, "worst dimension", "hypervolume", "wins against start"),
        "wins against AMoPO",
    ]
    return f"## The {size} size\n\n{markdown_table(header, rows)}"


def _share(study: Study, size: str, arm: str, other: str) -> str:
    if arm == other:
        return "–"
    wins = study.wins(size, arm, other)
    if wins is None:
        return "–"
    # An interval from few seeds may reach beyond what a share can be.
    middle, low, high = (100 * min(max(0.5 + x, 0.0), 1.0) for x in (wins.mean, wins.low, wins.high))
    return f"{middle:.0f} %" + ("" if math.isnan(wins.low) else f" ({low:.0f} to {high:.0f})")


def _further(study: Study) -> str:
    rows = []
    for arrow in FURTHER:
        there = study.compared_sizes(arrow)
        sizes = [size for size in there if study.compares(arrow, size)] or there  # not half a size beside a whole one
        differences = [study.difference(arrow, figure, sizes) for figure in FIGURES.values()]
        if any(differences):
            forms = ("+.2f", "+.2f", "+.3f")
            pairs = zip(differences, forms, strict=True)
            words = f"{title_of(arrow.better)} − {title_of(arrow.worse)}"
            rows.append([words, " and ".join(sizes), *(interval(each, form) for each, form in pairs)])
    header = ["difference", "sizes", "mean", "worst dimension", "hypervolume"]
    return f"""## Further differences

No claim is tested here: the intervals are not adjusted for their number.

{markdown_table(header, rows)}"""


def _asked(study: Study) -> str:
    def slope(run: Outcomes) -> float:
        return run.slope

    def error(run: Outcomes) -> float:
        return run.error

    rows = []
    for arm in ARM_NAMES:
        if not any(study.seeds(size, arm) for size in study.sizes):
            continue
        reads = arm != START and BY_NAME[arm].prompts > 1 and BY_NAME[arm].data == "full"
        cells = [interval(study.figure(size, arm, figure)) for size in study.sizes for figure in (slope, error)]
        rows.append([title_of(arm), "yes" if reads else "no", *cells])
    header = ["method", "trained on scores in prompts"]
    header += [f"{what}, {size}" for size in study.sizes for what in ("slope", "error in points")]
    return f"""## Does asking for a score yield it?

Each dimension's prompt asks for each score from 1 to 5, {ASKED_REQUESTS} requests each. The slope says by how many
points the measured score rises with each point that is asked for (1 as asked, 0 no effect); the error is the mean
distance of an answer from what was asked. The starting model was fitted to prompts that state true scores, so a slope
below its own is something unlearnt.

{markdown_table(header, rows)}"""


def _data(output: Path, study: Study, found: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "verdicts": [
            {
                "sizes": list(verdict.sizes),
                "better": verdict.arrow.better,
                "worse": verdict.arrow.worse,
                "verdict": verdict.word,
                "p_holm": None if math.isnan(verdict.p) else verdict.p,
                "difference": None if verdict.estimate is None else _finite(vars(verdict.estimate)),
            }
            for verdict in found
        ],
        "tuning": list(conditions.tuning_runs(output)),
        "runs": [
            {
                **{key: value for key, value in run.facts.items() if key not in ("general", "asked")},
                "mean": run.mean,
                "means": dict(zip(DIMENSIONS, run.means.tolist(), strict=True)),
                "worst": run.worst,
                "hypervolume": run.volume,
                "asked_means": run.obeyed.mean(axis=2).tolist(),
                "slope": run.slope,
                "error": run.error,
            }
            for run in study.runs.values()
        ],
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}
