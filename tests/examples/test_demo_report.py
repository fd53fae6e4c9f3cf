"""What the demo says of a run: read from a metrics file, and true also of a run that got worse."""

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from examples.demo_report import RunMetrics, dimensions_that_rose, draw_plots, figures_table, verdict

DIMENSIONS = ("general", "helpfulness", "tone_of_voice")


def _metrics(accuracies: list[float]) -> dict[str, float]:
    metrics = {"loss": 1.5}
    for name, accuracy in zip(DIMENSIONS, accuracies, strict=True):
        metrics |= {f"accuracy/{name}": accuracy, f"margin/{name}": accuracy - 0.5, f"weight/{name}": 1 / 3}
    return metrics


def _write(path: Path, before: list[float], after: list[float]) -> Path:
    rows: list[dict] = [{"iteration": 0, "split": "validation", "metrics": _metrics(before)}]
    rows += [{"iteration": n, "split": "train", "metrics": _metrics([0.5 + n / 100] * 3)} for n in range(1, 13)]
    rows += [{"iteration": 12, "split": "validation", "metrics": _metrics(after)}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reads_the_run(tmp_path: Path) -> None:
    run = RunMetrics.load(_write(tmp_path / "metrics.jsonl", [0.5, 0.5, 0.5], [0.7, 0.8, 0.9]))
    assert run.dimensions == DIMENSIONS
    assert run.steps == tuple(range(1, 13))
    assert run.training["accuracy/general"][1] == pytest.approx(0.52)
    assert (run.before.iteration, run.after.iteration) == (0, 12)


@pytest.mark.parametrize("kept", [slice(1, None), slice(None, -1), slice(0, 1), slice(0, 0)])
def test_refuses_a_run_without_both_evaluations(tmp_path: Path, kept: slice) -> None:
    path = _write(tmp_path / "metrics.jsonl", [0.5] * 3, [0.7] * 3)
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[kept]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        RunMetrics.load(path)


def test_verdict_of_a_rise(tmp_path: Path) -> None:
    run = RunMetrics.load(_write(tmp_path / "metrics.jsonl", [0.5, 0.6, 0.5], [0.7, 0.7, 0.9]))
    assert dimensions_that_rose(run) == DIMENSIONS
    # the standard error of the difference of two shares: √((0.6·0.4 + 0.7·0.3) / 400) = 3.4 points
    assert verdict(run, 400) == (
        "Preference accuracy rose on all 3 dimensions; smallest change: helpfulness, 60.0 % to 70.0 % "
        "(+10.0 points, standard error 3.4, 400 records)."
    )


def test_verdict_of_a_fall(tmp_path: Path) -> None:
    run = RunMetrics.load(_write(tmp_path / "metrics.jsonl", [0.5, 0.6, 0.5], [0.7, 0.6, 0.4]))
    assert dimensions_that_rose(run) == ("general",)
    said = verdict(run, 400)
    assert "did NOT rise on helpfulness, tone_of_voice" in said
    assert "50.0 % to 40.0 % (-10.0 points" in said


def test_table_names_units_and_fits_a_terminal(tmp_path: Path) -> None:
    run = RunMetrics.load(_write(tmp_path / "metrics.jsonl", [0.5, 0.6, 0.5], [0.7, 0.75, 0.9]))
    console = Console(width=80, record=True, file=(tmp_path / "shown").open("w"))
    console.print(figures_table(run, 400, {"helpfulness": (2.0, 3.25)}))
    text = console.export_text()
    for expected in (
        "nats/token",
        "accuracy, %",
        "fraction",
        "score 1-5",
        "tone of voice",
        "60.0 → 75.0",
        "2.00 → 3.25",
    ):
        assert expected in text
    assert "…" not in text


def test_plots_are_images(tmp_path: Path) -> None:
    run = RunMetrics.load(_write(tmp_path / "metrics.jsonl", [0.5, 0.6, 0.5], [0.7, 0.75, 0.9]))
    plots = draw_plots(run, tmp_path / "plots")
    assert [path.name for path in plots] == ["loss.png", "preferences.png", "weights.png"]
    for path in plots:
        with Image.open(path) as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20  # not blank
