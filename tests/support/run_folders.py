"""Folders that look like a run's and its data's, made of numbers that are easy to follow: for what reads them."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_amopo.data.groups import TokenizerFingerprint
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.prompts import PromptStyle

DIMENSIONS = ("general", "helpfulness", "instruction_following")
DATA_HASH = "0123456789abcdef" * 4
_KINDS = ("loss", "margin", "accuracy", "weight", "prob_mean", "prob_std", "logps_chosen", "logps_rejected")


def metrics_of(dimensions: Sequence[str], share: float) -> dict[str, float]:
    """A training line's figures when ``share`` of the run is done."""
    figures = {"loss": 2.0 - share, "tokens_per_record": 500.0, "imbalance": 1.0 + share / 10}
    spread = [1.0 + d * d * share for d in range(len(dimensions))]
    for d, name in enumerate(dimensions):
        values = (
            1.5 - share - 0.1 * d,
            0.1 + 0.3 * share + 0.01 * d,
            0.55 + 0.3 * share - 0.02 * d,
            spread[d] / sum(spread),
            0.6,
            0.4,
            -1.0,
            -1.4,
        )
        figures |= {f"{kind}/{name}": value for kind, value in zip(_KINDS, values, strict=True)}
    return figures


def leakage_of(dimensions: Sequence[str], share: float) -> dict[str, float]:
    """A leakage matrix as evaluation records it; the first dimension has no scores."""
    figures: dict[str, float] = {}
    for d, i in enumerate(dimensions[1:], start=1):
        figures[f"leakage_records/{i}"] = 300 + d
        for e, j in enumerate(dimensions):
            figures[f"leakage_margin/{i}/{j}"] = share * 0.4 - 0.02 * d + 0.05 * e
            figures[f"leakage_accuracy/{i}/{j}"] = 0.5 + 0.3 * share - 0.03 * d + 0.01 * e
    return figures


def conflict_of(dimensions: Sequence[str], share: float) -> dict[str, float]:
    """The conflict meter's figures."""
    figures = {f"gradient_norm/{name}": 0.05 * (d + 1) for d, name in enumerate(dimensions)}
    for (i, a), (j, b) in combinations(enumerate(dimensions), 2):
        figures[f"batch_cosine/{a}/{b}"] = 0.9 - 0.1 * (i + j) * share
        figures[f"record_cosine/{a}/{b}"] = 0.99 - 0.02 * j
        figures[f"record_conflict/{a}/{b}"] = 0.01 * j
    return figures


def write_lines(path: Path, lines: Sequence[tuple[int, str, dict[str, float]]]) -> None:
    """Write (step, split, figures) as the recorder does."""
    path.write_text(
        "".join(
            json.dumps({"iteration": step, "split": split, "metrics": figures}) + "\n" for step, split, figures in lines
        )
    )


def write_run(folder: Path, dimensions: Sequence[str] = DIMENSIONS, *, steps: int = 60, complete: bool = True) -> Path:
    """A run of ``steps`` steps with all that can be recorded, or, not ``complete``, with nothing but metrics of
    training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[tuple[int, str, dict[str, float]]] = []
    for step in range(1, steps + 1):
        share = step / steps
        rates = {"records_per_s": 14.0, "tokens_per_s": 7000.0, "learning_rate": 1e-3 * (1 - share), "grad_norm": 2.0}
        multipliers = {f"multiplier/{dimensions[-1]}": 0.1 * share} if complete else {}
        lines.append((step, "train", metrics_of(dimensions, share) | rates | multipliers))
        if complete and step % 20 == 0:
            lines.append((step, "conflict", conflict_of(dimensions, share)))
    if complete:
        for step in (0, steps):
            share = step / steps
            lines.append((step, "validation", metrics_of(dimensions, share) | leakage_of(dimensions, share)))
        (folder / "run.json").write_text(json.dumps(run_flags(dimensions)))
        (folder / "starts.jsonl").write_text("".join(json.dumps(start_of(step, steps)) + "\n" for step in (0, 30)))
        (folder / "hf").mkdir(exist_ok=True)
        shape = {"model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 128, "vocab_size": 1000}
        (folder / "hf/config.json").write_text(json.dumps(shape))
        (folder / "latest_checkpointed_iteration.txt").write_text(str(steps))
        write_ledger(folder / "ledger", dimensions)
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def run_flags(dimensions: Sequence[str]) -> dict[str, Any]:
    return {
        "--amopo-data": DATA_HASH,
        "--amopo-dimensions": list(dimensions),
        "--amopo-pairwise": "simpo",
        "--amopo-beta": 10.0,
        "--amopo-gamma": 0.5,
        "--amopo-ftx-gamma": 1.0,
        "--amopo-weighting": "gaussian",
        "--amopo-margin-floor": {dimensions[-1]: 0.2},
        "--amopo-seed": 1,
    }


def start_of(step: int, steps: int) -> dict[str, Any]:
    arguments = {"train_iters": steps, "global_batch_size": 16, "lr": 1e-3, "tensor_model_parallel_size": 2}
    versions = {"megatron-amopo": "0.1.0", "torch": "2.15.0"}
    time = f"2026-11-21T11:{step:02d}:00+00:00"
    return {"step": step, "time": time, "ranks": 2, "device": "CPU", "versions": versions, "arguments": arguments}


def write_ledger(folder: Path, dimensions: Sequence[str], *, records: int = 200, epochs: int = 2) -> None:
    """Margins that rise by 0.2 from epoch to epoch; record 0 has the lowest, -0.5 at first."""
    folder.mkdir()
    ids, depth = np.arange(records), len(dimensions)
    for epoch in range(epochs):
        margins_ND = np.linspace(-0.5, 1.0, records)[:, None] + 0.2 * epoch + 0.01 * np.arange(depth)
        table = pa.table(
            {
                "record_id": pa.array(ids.repeat(depth), pa.int64()),
                "epoch": pa.array(np.full(records * depth, epoch), pa.int32()),
                "step": pa.array(np.full(records * depth, epoch + 1), pa.int64()),
                "dimension": pa.array(list(dimensions) * records),
                "margin": pa.array(margins_ND.ravel(), pa.float32()),
                "weight": pa.array(np.full(records * depth, 1 / depth), pa.float32()),
            }
        )
        pq.write_table(table, folder / f"part-{epoch + 1:09d}-{epoch + 1:09d}-00000.parquet")


def write_data(folder: Path, dimensions: Sequence[str] = DIMENSIONS, data_hash: str = DATA_HASH) -> Path:
    """The manifest and the report of prepared data, without the records."""
    folder.mkdir(parents=True)
    percentiles = {"0": 60, "50": 80, "90": 90, "95": 95, "99": 99, "100": 1200}
    Manifest(
        dimensions=tuple(dimensions),
        tokenizer=TokenizerFingerprint("a", "b", 1000, 2, 0, "tiny"),
        prompts=PromptStyle.load("published_system").content,
        scale=(1.0, 5.0),
        cutoff_len=2048,
        records={"train": 2000, "validation": 400},
        length_percentiles={"prompt": percentiles, "response": percentiles},
        data_sha256=data_hash,
        created_with={"megatron-amopo": "0.1.0"},
    ).save(folder)
    agreement = {"mean_chosen": 3.3, "mean_rejected": 2.2, "chosen_better": 0.64, "equal": 0.21, "chosen_worse": 0.15}
    report = {
        "inputs": {"train.jsonl": "native"},
        "rows_read": 2417,
        "kept": {"train": 2000, "validation": 400},
        "prompts_shared_between_splits": 0,
        "cut": {"records": 3, "prompts": 3, "responses": 0},
        "scores": {name: agreement for name in dimensions[1:]},
        "rewards": {},
        "dropped": {
            "empty_response": {
                "count": 17,
                "meaning": "a response has no text",
                "examples": ["train.jsonl:12: rejected"],
            }
        },
        "response": {},
        "repaired": {},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder
