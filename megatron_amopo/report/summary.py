"""What a run comes to, in words and a few figures: for the head of the page and for the model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_amopo.report.prepared import PreparedData
from megatron_amopo.report.run import Line, Run, Series
from megatron_amopo.report.words import as_text, change, objective_in_words, wilson_interval

_NAMED = 5  # bad steps that a warning lists


@dataclass(frozen=True)
class DimensionResult:
    """A dimension's figures before and after, written out."""

    dimension: str
    margin: str
    accuracy: str
    weight: str
    floor: str


def validation_records(data: PreparedData | None) -> int | None:
    """How many records evaluations are means of; None where the data isn't known."""
    return data.manifest.records.get("validation") if data else None


def facts(run: Run, data: PreparedData | None) -> list[tuple[str, str]]:
    """What was trained on what, in a few lines of (what, value)."""
    lines = [
        ("Objective", objective_in_words(run.flags, len(run.dimensions)) if run.flags else "not recorded"),
        ("Dimensions", f"{len(run.dimensions)}: {', '.join(run.dimensions)}" if run.dimensions else "not recorded"),
        ("Model", _model(run)),
        ("Data", _data(run, data)),
        ("Steps", _progress(run)),
    ]
    rates = [Series.of(run.training, name).values for name in ("records_per_s", "tokens_per_s")]
    if all(np.isfinite(values).any() for values in rates):
        records_per_s, tokens_per_s = (float(np.nanmedian(values)) for values in rates)
        lines.append(("Speed", f"{records_per_s:,.4g} records/s, {tokens_per_s:,.0f} tokens/s (median of log lines)"))
    return lines


def results(run: Run, records: int | None) -> list[DimensionResult]:
    """Figures per dimension: before → after on the validation records, or of the last logged training steps where
    nothing was evaluated.
    """
    before, after = _compared(run)
    if before is None and after is None:
        return []
    floors = run.flags.get("--amopo-margin-floor")

    def shown(name: str, form: str, scale: float = 1.0) -> str:
        return change(_scaled(before, name, scale), _scaled(after, name, scale), form)

    rows = []
    for dimension in run.dimensions:
        accuracy = f"accuracy/{dimension}"
        last = _scaled(after or before, accuracy, 1.0)
        interval = wilson_interval(last, records) if run.evaluations or run.evaluated_alone else None
        range_of = "" if interval is None else f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"
        rows.append(
            DimensionResult(
                dimension,
                margin=shown(f"margin/{dimension}", "+.3f"),
                accuracy=shown(accuracy, ".1f", 100) + range_of,
                weight=shown(f"weight/{dimension}", ".3f"),
                floor=as_text(floors[dimension]) if isinstance(floors, Mapping) and dimension in floors else "–",
            )
        )
    return rows


def _scaled(line: Line | None, name: str, scale: float) -> float | None:
    value = line.metrics.get(name) if line else None
    return None if value is None else scale * value


def _compared(run: Run) -> tuple[Line | None, Line | None]:
    if run.evaluations:
        return run.before, run.after
    return None, run.evaluated_alone or (run.training[-1] if run.training else None)


def results_are(run: Run, records: int | None) -> str:
    """What the figures of :func:`results` are, in words."""
    of = f"{records:,} validation records" if records else "the validation records"
    interval = "; in brackets the last accuracy's 95 % interval" if records else ""
    if run.before and run.after:
        return f"Means over {of}: after step {run.before.step} → after step {run.after.step}{interval}."
    if run.before:
        missing = "--amopo-eval-at-start and --eval-interval evaluate at other steps, too"
        return f"Means over {of} after step {run.before.step}, the only evaluation ({missing}){interval}."
    if run.evaluated_alone:
        return f"Means over {of}, evaluated with --skip-train at step {run.evaluated_alone.step}{interval}."
    if run.training:
        return (
            f"Nothing was evaluated: means over the training batches of the log line of step {run.training[-1].step}. "
            "Data that is prepared with a validation part is evaluated at the end and every --eval-interval steps."
        )
    return "Nothing was logged yet: the first line comes after --log-interval steps."


def _model(run: Run) -> str:
    words = []
    if run.model:
        shape = (("num_hidden_layers", "layers"), ("hidden_size", "wide"), ("vocab_size", "tokens"))
        known = [f"{run.model[key]:,} {what}" for key, what in shape if isinstance(run.model.get(key), int)]
        words.append(f"{run.model.get('model_type', 'model')} ({', '.join(known)})")
    source = run.arguments.get("amopo_hf_model") or run.arguments.get("pretrained_checkpoint")
    if source:
        words.append(f"from {source}")
    return ", ".join(words) or "not recorded yet: it is with the first checkpoint"


def _data(run: Run, data: PreparedData | None) -> str:
    digest = run.flags.get("--amopo-data")
    words = [f"hash {str(digest)[:12]}"] if digest else []
    if data is not None:
        kept = ", ".join(f"{count:,} {split}" for split, count in data.manifest.records.items())
        words = [str(data.folder), f"{kept} records", *words]
    return ", ".join(words) or "not recorded yet: it is with the first checkpoint"


def _progress(run: Run) -> str:
    planned, words = run.total_steps, []
    if planned is None:
        words.append(f"{run.last_step:,} (how many were planned isn't recorded)")
    elif run.last_step < planned:
        words.append(f"{run.last_step:,} of {planned:,}: unfinished")
    else:
        words.append(f"{run.last_step:,} of {planned:,}")
    size = run.arguments.get("global_batch_size")
    if size:
        words.append(f"{size:,} records each")
    words.append("no checkpoint" if run.saved_step is None else f"last checkpoint: step {run.saved_step:,}")
    return ", ".join(words)


def warnings(run: Run) -> list[str]:
    """What a reader must not overlook."""
    found = [
        f"{name} ends in half a line, which is being written or was cut off by a kill; it is left out."
        for name in run.cut_off
    ]
    if run.not_finite is not None:
        name, step = run.not_finite
        found.append(f"{name} isn't a finite number at step {step:,}; the figures after it may mean nothing.")
    if run.bad_steps:
        found.append(_bad_steps(run.bad_steps))
    if run.total_steps is not None and run.last_step < run.total_steps:
        found.append(f"This run is unfinished: step {run.last_step:,} of {run.total_steps:,}.")
    return found


def _bad_steps(lines: Sequence[Line]) -> str:
    found = {line.step: line.reason for line in lines}  # a step that a resumed run met again counts once
    named = ", ".join(f"{step:,} ({reason or 'no reason recorded'})" for step, reason in list(found.items())[:_NAMED])
    left = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    return f"{len(found):,} bad step{'s' * (len(found) > 1)} left the weights as they were: {named}{left}."
