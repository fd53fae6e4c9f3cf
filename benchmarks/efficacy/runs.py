"""One run of the study: train an arm, export it, let it answer, score the answers by rule.

Takes an arm, a size, a seed and the study's folder; leaves one small JSON file. Training is the project's own, through
Megatron's ``pretrain`` on one rank, within the process that calls, as certificates do it; answers come from the
exported model in transformers. A run in ``tuning`` answers other requests than one in ``runs``, under a seed that no
run in ``runs`` has.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.efficacy.accounting import cost_of
from benchmarks.efficacy.arms import (
    ASKED_REQUESTS,
    BY_NAME,
    LEARNING_RATES,
    SIZES,
    START,
    STEPS,
    TUNING_SEED,
    Arm,
    Setting,
    grid,
)
from benchmarks.efficacy.sampling import Sampler
from benchmarks.efficacy.seeds import read_requests, seed_folder, start_folder
from megatron_amopo import __version__
from megatron_amopo.files import write_whole

WARMUP_STEPS = 5
COMMON_FLAGS = (
    *("--lr-decay-style", "cosine", "--min-lr", "0", "--lr-warmup-iters", str(WARMUP_STEPS)),
    *("--weight-decay", "0", "--clip-grad", "1", "--log-interval", "10"),
    *("--finetune", "--no-save-optim", "--no-save-rng"),
)
EXAMPLES = 3


def run_file(output: Path, size: str, arm: str, seed: int) -> Path:
    """Where a finished run lies."""
    return output / "runs" / f"{size}-{arm}-{seed}.json"


def tuning_file(output: Path, size: str, arm: str, number: int) -> Path:
    """Where a finished tuning run lies, of the n-th setting that an arm chooses among."""
    return output / "tuning" / f"{size}-{arm}-{number}.json"


def number_of_settings(size: str, arm: Arm) -> int:
    """How many an arm chooses among: the whole grid at the first size, learning rates alone at the others."""
    return len(grid(arm)) if size == SIZES[0].name else len(LEARNING_RATES)


def settings(output: Path, size: str, arm: Arm) -> list[Setting]:
    """What an arm chooses among. After the first size, the hyperparameters are those chosen there."""
    if size == SIZES[0].name:
        return grid(arm)
    chosen = chosen_setting(output, SIZES[0].name, arm)
    return [Setting(rate, chosen.hyperparameters) for rate in LEARNING_RATES]


def chosen_setting(output: Path, size: str, arm: Arm) -> Setting:
    """The setting with the highest mean score on the tuning requests, of equal ones the first."""
    tuned = BY_NAME[arm.tunes_as]
    tried = settings(output, size, tuned)
    files = [tuning_file(output, size, tuned.name, number) for number in range(len(tried))]
    facts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for setting, file, found in zip(tried, files, facts, strict=True):
        of_file = Setting(found["learning_rate"], found["hyperparameters"])
        assert of_file == setting, f"{file} is of {of_file.name}, not of {setting.name}"
    scores = [found["mean"] for found in facts]
    return tried[scores.index(max(scores))]


def tune(output: Path, size: str, arm: str, number: int) -> None:
    """A run of an arm's n-th setting under the tuning seed."""
    begun = time.monotonic()
    setting = settings(output, size, BY_NAME[arm])[number]
    scratch = _scratch(output, f"tuning-{size}-{arm}-{number}")
    model, _ = _train(output, size, BY_NAME[arm], TUNING_SEED, setting, scratch)
    scores, answers = Sampler(model).general(read_requests(output, TUNING_SEED, "tuning"), TUNING_SEED)
    shutil.rmtree(scratch)
    facts = {
        "learning_rate": setting.learning_rate,
        "hyperparameters": dict(setting.hyperparameters),
        "mean": float(scores.mean()),
        "means": scores.mean(axis=0).tolist(),
        "examples": answers[:EXAMPLES],
        "seconds": time.monotonic() - begun,
        "code": code_version(),
    }
    keep(tuning_file(output, size, arm, number), facts)


def run(output: Path, size: str, arm: str, seed: int) -> None:
    """A run that counts: its scores, its cost. The arm ``start`` is the starting model as it is."""
    begun = time.monotonic()
    scratch = _scratch(output, f"{size}-{arm}-{seed}")
    facts: dict[str, Any] = {"arm": arm, "size": size, "seed": seed}
    if arm == START:
        model = start_folder(output, seed, size) / "hf"
    else:
        setting = chosen_setting(output, size, BY_NAME[arm])
        model, facts["training"] = _train(output, size, BY_NAME[arm], seed, setting, scratch)
        facts |= {
            "learning_rate": setting.learning_rate,
            "hyperparameters": dict(setting.hyperparameters),
            "cost": asdict(_cost(output, size, BY_NAME[arm], seed)),
            "training_seconds": time.monotonic() - begun,
        }
    sampler = Sampler(model)
    requests = read_requests(output, seed, "test")
    general, answers = sampler.general(requests, seed)
    asked = sampler.asked(requests[:ASKED_REQUESTS], seed)
    shutil.rmtree(scratch, ignore_errors=True)
    facts |= {
        "general": digits(general),
        "asked": digits(asked),
        "examples": answers[:EXAMPLES],
        "seconds": time.monotonic() - begun,
        "code": code_version(),
    }
    keep(run_file(output, size, arm, seed), facts)


@cache
def code_version() -> str:
    """The commit of this checkout, with ``-dirty`` where files differ from it; without git, the version."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__


def keep(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a finished job's file, by whose being there it is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(facts) + "\n")


def digits(scores: np.ndarray) -> dict[str, Any]:
    """Scores as one string of digits with their shape: a run stays small."""
    return {"shape": list(scores.shape), "digits": "".join(map(str, scores.ravel().tolist()))}


def from_digits(kept: Mapping[str, Any]) -> np.ndarray:
    """The inverse of :func:`digits`."""
    return np.array([int(digit) for digit in kept["digits"]], dtype=np.int8).reshape(kept["shape"])


def _train(
    output: Path, size: str, arm: Arm, seed: int, setting: Setting, scratch: Path
) -> tuple[Path, dict[str, float]]:
    """The aligned model as a Hugging Face folder, and the metrics of its last steps."""
    from megatron_amopo.certification.observed_run import metrics
    from megatron_amopo.checkpoint.convert import megatron_to_hf

    checkpoint = train_arm(output, size, arm, seed, setting, scratch)
    megatron_to_hf(checkpoint, scratch / "hf")
    last = metrics(checkpoint)[-1]
    kept = {
        name: value for name, value in last.items() if name.split("/")[0] in ("loss", "margin", "accuracy", "weight")
    }
    return scratch / "hf", kept


def train_arm(
    output: Path, size: str, arm: Arm, seed: int, setting: Setting, scratch: Path, further: Sequence[str] = ()
) -> Path:
    """Train an arm, with ``further`` flags; the run's folder, within ``scratch``."""
    from megatron_amopo.certification.observed_run import train

    checkpoint = scratch / "checkpoint"
    paths = {
        "--amopo-data": seed_folder(output, seed) / arm.data,
        "--pretrained-checkpoint": start_folder(output, seed, size) / "megatron",
        "--save": checkpoint,
    }
    flags = [word for flag, path in paths.items() for word in (flag, str(path))]
    # Megatron wants a seed above 0.
    train([*flags, *arm.flags(seed, setting), *COMMON_FLAGS, "--seed", str(1 + seed), *further], want_tensors=False)
    return checkpoint


def _cost(output: Path, size: str, arm: Arm, seed: int) -> Any:
    from megatron_amopo.data.dataset import PreparedGroups
    from megatron_amopo.objectives.registry import PAIRWISE_LOSSES

    return cost_of(
        PreparedGroups.open(seed_folder(output, seed) / arm.data, dimensions=arm.dimensions(seed)),
        steps=STEPS,
        records_per_step=arm.records_per_step,
        seed=1 + seed,
        config=json.loads((start_folder(output, seed, size) / "hf" / "config.json").read_text(encoding="utf-8")),
        reference=PAIRWISE_LOSSES[arm.pairwise].needs_reference,
    )


def _scratch(output: Path, name: str) -> Path:
    """An empty folder for what a run doesn't keep."""
    folder = output / "scratch" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
