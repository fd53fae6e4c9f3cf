"""The certificate on paper: ``certificate.md`` for people, ``certificate.json`` for programs.

Takes the outcomes of ``certify.py``; gives two files, written beside and renamed.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import megatron_amopo
from megatron_amopo.certification.certify import COPIES_LIMIT, Outcome
from megatron_amopo.certification.comparison import Errors
from megatron_amopo.certification.problems import BATCH
from megatron_amopo.files import write_whole

MARKDOWN, JSON = "certificate.md", "certificate.json"

_PACKAGES = ("torch", "megatron-core", "transformers")
_COLUMNS = {
    "loss": "loss",
    "grad": "gradients",
    "weight": "weights",
    "moved": "distance moved",
    "adam_loss": "loss, Adam",
}


def environment(*, command: str, steps: int, tolerance: float) -> dict[str, Any]:
    """What a reader needs to know about how a certificate was made; nothing that tells this machine from its like."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "steps": steps,
        "tolerance": tolerance,
        "versions": {
            "megatron-amopo": megatron_amopo.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "machine": {"cores": cores, "architecture": platform.machine(), "gpus": gpus},
    }


def write_certificate(
    folder: Path, outcomes: Sequence[Outcome], about: Mapping[str, Any], left_out: Mapping[str, str]
) -> None:
    """Write both files. In JSON ``layouts`` are those of float32, with one tolerance; ``bf16_layouts`` have their own.

    Args:
        folder: made if it isn't there.
        outcomes: at least one.
        about: of :func:`environment`.
        left_out: layouts that this machine can't run, and why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "layouts": [_entry(outcome) for outcome in outcomes if not outcome.layout.bf16],
        "bf16_layouts": [_entry(outcome) for outcome in outcomes if outcome.layout.bf16],
        "passed": all(outcome.passed for outcome in outcomes),
        **about,
        "left_out": dict(left_out),
    }
    # Python writes Infinity and NaN, which aren't JSON; a limit that doesn't exist and an error that is no number are.
    write_whole(folder / JSON, json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / MARKDOWN, markdown(outcomes, about, left_out))


def markdown(outcomes: Sequence[Outcome], about: Mapping[str, Any], left_out: Mapping[str, str]) -> str:
    """The certificate as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = about["machine"]
    hardware = f"{machine['cores']} CPU cores ({machine['architecture']})" + "".join(f", {g}" for g in machine["gpus"])
    passed = sum(outcome.passed for outcome in outcomes)
    float32 = [outcome for outcome in outcomes if not outcome.layout.bf16 and outcome.failure is None]
    bf16 = [outcome for outcome in outcomes if outcome.layout.bf16 and outcome.failure is None]
    failed = [outcome for outcome in outcomes if outcome.failure is not None]

    text = f"# One result under every layout\n\n**{passed} of {len(outcomes)} layouts passed.** {about['date']}, "
    text += f"{hardware}; {versions}; by\n\n    {about['command']}\n\n"
    text += (
        f"A tiny random model is trained for {about['steps']} steps of {BATCH} records through Megatron's `pretrain` "
        "under each layout, and compared\nwith one rank and with its objective written plainly: padded rows, "
        "transformers' model, logits of the whole vocabulary, float64.\nErrors are relative: of the losses that of the "
        "worst step, of the others the norm of the difference over the norm. Gradients are the first\nstep's; weights "
        "and the distance that they moved are those after the last step of SGD. `copies` says how far ranks differ "
        f"that hold the same\ntensor; at most {COPIES_LIMIT:g}.\n"
    )
    if float32:
        limits = float32[0].limits
        text += (
            f"\n## float32\n\nAgainst one rank / against the plain reference. Tolerance {about['tolerance']:g}; "
            f"{limits.moved:g} for the distance moved, which float32 doesn't resolve better\nbeside the weights.\n\n"
        )
        header = ["layout", "ranks", *_COLUMNS.values(), "copies", ""]
        text += _table(header, [_float32_row(outcome) for outcome in float32])
    if bf16:
        limits = bf16[0].limits
        text += "\n## bf16\n\nAgainst the plain reference in float64 / the same of plain torch in bf16. Tolerances: "
        text += f"{limits.loss:g} for losses, {limits.grad:g} for gradients, {limits.weight:g} for\nweights, "
        text += (
            "which are compared as the model holds them: most of the distance that they moved is lost in rounding.\n\n"
        )
        header = ["layout", "ranks", *_COLUMNS.values(), "copies", ""]
        text += _table(header, [_bf16_row(outcome) for outcome in bf16])
    if failed:
        text += "\n## Not computed\n\n"
        for outcome in failed:
            text += f"- {outcome.layout.name}: `{_last_line(outcome.failure)}`\n"
    for why in dict.fromkeys(left_out.values()):
        text += f"\nLeft out ({why}): {', '.join(name for name, reason in left_out.items() if reason == why)}.\n"
    return text


def _float32_row(outcome: Outcome) -> list[str]:
    assert outcome.one_rank is not None
    assert outcome.plain is not None
    return _row(outcome, outcome.one_rank, outcome.plain)


def _bf16_row(outcome: Outcome) -> list[str]:
    assert outcome.plain is not None
    assert outcome.plain_bf16 is not None
    return _row(outcome, outcome.plain, outcome.plain_bf16)


def _row(outcome: Outcome, left: Errors, right: Errors) -> list[str]:
    pairs = {kind: (asdict(left)[kind], asdict(right)[kind]) for kind in _COLUMNS}
    exceeded = outcome.exceeded
    cells = [f"**{a:.1e} / {b:.1e}**" if kind in exceeded else f"{a:.1e} / {b:.1e}" for kind, (a, b) in pairs.items()]
    copies = f"**{outcome.copies:.1e}**" if "copies" in exceeded else f"{outcome.copies:.1e}"
    verdict = "passed" if outcome.passed else "**failed**"
    return [outcome.layout.name, str(outcome.layout.ranks), *cells, copies, verdict]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _entry(outcome: Outcome) -> dict[str, Any]:
    """A layout in JSON; its errors are the larger ones of both comparisons, null where there are none."""
    worst = None if outcome.worst is None else asdict(outcome.worst)
    return {
        "name": outcome.layout.name,
        **{f"{kind}_error": None if worst is None else worst[kind] for kind in _COLUMNS},
        "copies_error": outcome.copies,
        "passed": outcome.passed,
        "exceeded": outcome.exceeded,
        "failure": outcome.failure,
        "limits": asdict(outcome.limits),
        "against_one_rank": outcome.one_rank and asdict(outcome.one_rank),
        "against_plain": outcome.plain and asdict(outcome.plain),
        "plain_bf16_against_plain": outcome.plain_bf16 and asdict(outcome.plain_bf16),
        "device": "GPU, NCCL" if outcome.layout.gpus else "CPU, gloo",
        "ranks": outcome.layout.ranks,
        "flags": list(outcome.layout.flags),
        "problem": asdict(outcome.layout.problem),
        "seconds": round(outcome.seconds, 1),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _last_line(text: str | None) -> str:
    return (text or "").strip().rsplit("\n", 1)[-1]
