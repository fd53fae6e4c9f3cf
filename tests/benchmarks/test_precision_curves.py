"""The page of loss curves says what the runs say."""

import pytest

from benchmarks.precision_curves import plot, report


def run(offset, flips=()):
    lines = [
        {"iteration": step, "loss": 2.0 - 0.1 * step + offset, "margin/a": 0.1 * step, "margin/b": 0.3 * step}
        for step in (1, 2, 3)
    ]
    checks = [{"logp_difference": 0.01, "flipped/a": flip, "flipped/b": 0.0} for flip in flips]
    return {"train": lines, "fp8": checks}


RUNS = {"bf16": run(0.0), "bf16, another order": run(0.2), "FP8": run(-0.05, flips=(0.1, 0.3))}


def test_report():
    rows = {line.split(" | ")[0]: line for line in report(RUNS).splitlines() if line.startswith("| ")}
    assert rows["| bf16"].startswith("| bf16 | 1.7000 | 0.0000 | +0.600 | – | –")
    assert rows["| bf16, another order"].startswith("| bf16, another order | 1.9000 | 0.2000 |")
    assert rows["| FP8"].startswith("| FP8 | 1.6500 | 0.0500 | +0.600 | 0.0100 | 10.00")


def test_plot():
    loss, margin = plot(RUNS).axes
    assert [line.get_label() for line in loss.lines] == list(RUNS)
    assert loss.lines[2].get_ydata()[-1] == pytest.approx(1.65)
    assert list(margin.lines[0].get_ydata()) == pytest.approx([0.2, 0.4, 0.6])
