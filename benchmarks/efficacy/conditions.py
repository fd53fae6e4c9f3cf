"""What the study's results rest on: compute, settings, task and statistics, for its page.

Takes the study's folder and its runs; gives Markdown.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.efficacy.arms import (
    ARMS,
    HYPERPARAMETERS,
    LEARNING_RATES,
    PAIRS_PER_STEP,
    RECORDS,
    SEEDS,
    SIZES,
    START,
    STEPS,
    TEST_REQUESTS,
    TUNING_REQUESTS,
    TUNING_SEED,
)
from benchmarks.efficacy.outcomes import Study
from benchmarks.efficacy.runs import number_of_settings, tuning_file
from benchmarks.efficacy.seeds import seed_folder, start_folder
from benchmarks.efficacy.task import DIMENSIONS, conflict
from benchmarks.support import markdown_table


def compute(study: Study) -> str:
    """What each arm's runs read and computed, and the settings that they took."""
    rows = []
    for size in study.sizes:
        for arm in ARMS:
            seeds = study.seeds(size, arm.name)
            if not seeds:
                continue
            facts = [study.runs[size, arm.name, seed].facts for seed in seeds]
            cost = {name: float(np.mean([each["cost"][name] for each in facts])) for name in facts[0]["cost"]}
            values = ", ".join(f"{name} {value:g}" for name, value in facts[0]["hyperparameters"].items())
            rows.append(
                [
                    f"{arm.title}, {size}",
                    arm.prompts,
                    f"{cost['distinct_records']:,.0f} × {cost['records'] / cost['distinct_records']:.1f}",
                    f"{cost['pairs']:,.0f}",
                    f"{cost['tokens']:,.0f}",
                    f"{cost['flops'] / 1e12:.2f}",
                    f"{cost['reference_flops'] / 1e12:.2f}",
                    f"{facts[0]['learning_rate']:g}{_at_edge(facts[0]['learning_rate'])}",
                    values or "–",
                ]
            )
    header = [
        *("method", "prompts", "records × epochs", "pairs", "tokens", "TFLOP", "TFLOP of the reference"),
        *("learning rate", "hyperparameters"),
    ]
    return f"""## Compute

The rule: every method takes {STEPS} optimizer steps on {PAIRS_PER_STEP} pairs each, a pair being a record under one
prompt. A method with one prompt therefore sees the same {RECORDS} records four times as often as AMoPO; MODPO has
fewer of them, since records that tie on its trained objective have no order to learn. Tokens and
operations are those of one run, means over seeds; methods with a reference model compute its log-probabilities on top.
Four times the same prompt is computed once, which is why that arm takes fewer tokens.

{markdown_table(header, rows)}"""


def _at_edge(rate: float) -> str:
    return " (lowest)" if rate == min(LEARNING_RATES) else " (highest)" if rate == max(LEARNING_RATES) else ""


def tuning(output: Path) -> str:
    """How the settings were chosen, with the score of every setting."""
    scores = {(run["size"], run["arm"], run["number"]): run["mean"] for run in tuning_runs(output)}
    rows = []
    for arm in ARMS:
        cells = [
            f"{scores[key]:.2f}" if (key := (size.name, arm.name, number)) in scores else "–"
            for size in SIZES
            for number in range(most_settings(size.name))
        ]
        if arm.tunes_as == arm.name:
            rows.append([arm.title, *cells])
    first, *others = SIZES
    kinds = ("published", "larger β")
    header = ["method", *(f"{kind}, {rate:g}, {first.name}" for kind in kinds for rate in LEARNING_RATES)]
    header += [f"chosen, {rate:g}, {size.name}" for size in others for rate in LEARNING_RATES]
    return f"""## Settings

The learning rate and the pair loss's hyperparameters (published, or a larger β) are those with the highest mean score
on {TUNING_REQUESTS} other requests under a seed of its own, which no other run has. The large size chooses among the
same learning rates and takes over the hyperparameters. Arms that aren't listed take AMoPO apart, have no claim made of
them, and take AMoPO's. One seed tunes: settings that differ by little were chosen among by chance, and what takes turns
with the seed (MODPO's trained objective, which prompts are left out) is tuned in one of its three ways. The highest
learning rate was added to the grid when methods chose the one below it, before any run that counts. The scores say how
much a method depends on its setting:

{markdown_table(header, rows)}"""


def tuned_and_tested(output: Path, study: Study) -> str:
    """How the chosen setting did under the seed that chose it, and under those that count."""
    best: dict[tuple[str, str], float] = {}
    for run in tuning_runs(output):
        key = run["size"], run["arm"]
        best[key] = max(best.get(key, run["mean"]), run["mean"])
    rows = []
    for size in study.sizes:
        for arm in ARMS:
            means = [study.runs[size, arm.name, seed].mean for seed in study.seeds(size, arm.name)]
            if means and (size, arm.tunes_as) in best:
                found = best[size, arm.tunes_as]
                rows.append(
                    [
                        f"{arm.title}, {size}",
                        f"{found:.2f}" if arm.tunes_as == arm.name else f"{found:.2f} (AMoPO's)",
                        f"{np.mean(means):.2f}",
                        f"{min(means):.2f} – {max(means):.2f}",
                    ]
                )
    header = ["method", "under the tuning seed", "mean over the others", "lowest – highest"]
    return f"""The chosen setting's mean score under the seed that chose it, and under those that count. Where a method
falls far from the one to the other, its place says as much about tuning on one seed as about the method.

{markdown_table(header, rows)}"""


def most_settings(size: str) -> int:
    """Of any arm."""
    return max(number_of_settings(size, arm) for arm in ARMS)


def tuning_runs(output: Path) -> Iterator[dict[str, Any]]:
    """Every tuning run that is there."""
    for size in SIZES:
        for arm in ARMS:
            for number in range(number_of_settings(size.name, arm)):
                file = tuning_file(output, size.name, arm.name, number)
                if file.is_file():
                    facts = json.loads(file.read_text(encoding="utf-8"))
                    yield {"size": size.name, "arm": arm.name, "number": number, "seed": TUNING_SEED, **facts}


def method(output: Path, study: Study) -> str:
    """Task, models, figures and statistics in words."""
    shares = [
        conflict([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
        for seed in SEEDS
        if (file := seed_folder(output, seed) / "records.jsonl").is_file()
    ]
    listing = ", ".join(
        f"on {name} in {np.mean([share[name] for share in shares]):.0%}" for name in DIMENSIONS if shares
    )
    sizes = ", ".join(f"{facts['parameters']:,} weights ({size})" for size, facts in _starts(output, study).items())
    bias = _hypervolume_bias(study)
    published = "; ".join(
        f"{loss}: " + " or ".join(", ".join(f"{name} {value:g}" for name, value in each.items()) for each in values)
        for loss, values in HYPERPARAMETERS.items()
        if values[0]
    )
    return f"""## What was done

**Task** (`task.py`). A request asks for four words of one kind. Answers are scored by rule, 1–5: courtesies
(helpfulness), right words (correctness), few words (brevity); each courtesy beyond two costs about a point of brevity.
The better total is chosen; the chosen answer is the worse one {listing} of the records.

**Models.** Qwen2's architecture, {sizes}; fitted to pairs of answers that score alike, under prompts that state their
score: they answer, and read prompts, without preferring. Weights, data, order, noise and sampling are of the seed; all
arms of a seed and size start from the same model and answer the same {TEST_REQUESTS} requests, none of whose
combinations of asked words occurs in training, drawing the same random numbers.

**Training** is the project's own, through Megatron on one rank; Adam, a cosine schedule. Hyperparameters tried:
{published}. MODPO's weights are even; its trained objective, and which dimensions AMoPO with fewer prompts leaves out,
take turns with the seed.

**Figures.** Mean: over dimensions and requests, under the general prompt, as is the win rate (higher total of the two
answers to a request, ties as half). Where methods differ most in one dimension, the mean mostly says how they differ
there: see the worst dimension, the lowest of the three means, beside it. Hypervolume: the share of all vectors of mean
scores that the model reaches or exceeds under some of sixteen prompts (the general one, and each dimension's asking for
each score); every method is measured under all of them. Noise in those means adds to a union of boxes: {bias}

**Fewer dimensions** are fewer prompts: the general prompt, which names all dimensions, is always among them, and the
chosen answer is the better one over all dimensions whatever the prompts. What is left out is a dimension's own prompt.

**Statistics.** The unit is the seed. Intervals are Student's t over seeds, {len(SEEDS)} when all are in; differences
are taken within seeds, and where two sizes are put together over both within a seed first, as they share its data.
Claims were fixed before any run (`arms.py`), as was that they are judged over both sizes together; they are adjusted
together by Holm's method. Each size's own verdicts, decided on after the small size had been run, are adjusted over the
claims, not for there being two sizes. All other intervals are not adjusted.
"""


def _hypervolume_bias(study: Study) -> str:
    if not study.runs:
        return "how much, runs will say."
    own = np.mean([run.volume for run in study.runs.values()])
    halves = np.mean([run.volume_of_halves for run in study.runs.values()])
    return (
        f"from half of the answers it comes out {halves - own:+.3f} higher on average ({halves:.3f} for {own:.3f}), so "
        "small differences between methods that reach differently far apart under their prompts mean nothing."
    )


def _starts(output: Path, study: Study) -> dict[str, Any]:
    seeds = {size: study.seeds(size, START) for size in study.sizes}
    files = {size: start_folder(output, own[0], size) / "start.json" for size, own in seeds.items() if own}
    return {size: json.loads(file.read_text(encoding="utf-8")) for size, file in files.items() if file.is_file()}
