"""What a plot shows is what was recorded under its title: curves, matrices, histograms, read back from the drawing."""

import numpy as np
import pytest
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from megatron_amopo.report import plots
from megatron_amopo.report.figures import conflict_plots, course_plots, dimension_plots, leakage_plots, ledger_plots
from megatron_amopo.report.ledger import summarise_ledger
from megatron_amopo.report.run import Run
from tests.support.run_folders import DIMENSIONS, conflict_of, leakage_of, metrics_of, write_run

STEPS = 20  # so few that nothing is smoothed
NAMES = [name.replace("_", " ") for name in DIMENSIONS]  # as plots write them
TITLES = {"margin": "Margin", "accuracy": "Preference accuracy", "weight": "Weight in the loss", "loss": "Pair loss"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.load(write_run(tmp_path_factory.mktemp("run") / "run", steps=STEPS))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by title, as they are when they become markup."""
    found: dict[str, Figure] = {}

    def keep(figure: Figure, title: str) -> Markup:
        assert figure.axes[0].get_title() == title
        found[title] = figure
        plt.close(figure)
        return Markup("")

    monkeypatch.setattr(plots, "_svg", keep)
    return found


def curve(figure: Figure, number: int) -> tuple[list[int], list[float]]:
    """Each curve is followed by its dots."""
    line = figure.axes[0].lines[number]
    return line.get_xdata().tolist(), line.get_ydata().tolist()


def matrix(figure: Figure) -> tuple[list[str], list[str], np.ndarray]:
    """Names of rows and columns, entries."""
    axes = figure.axes[0]
    rows, columns = (
        [label.get_text() for label in labels] for labels in (axes.get_yticklabels(), axes.get_xticklabels())
    )
    entries = np.asarray(axes.images[0].get_array())
    written = [text for text in axes.texts if text.get_text()]
    assert len(written) == np.isfinite(entries).sum()
    for text in written:
        column, row = text.get_position()
        assert float(text.get_text()) == pytest.approx(entries[row, column], abs=0.0051)
    return rows, columns, entries


def test_dimensions_over_training(run: Run, drawn: dict[str, Figure]) -> None:
    dimension_plots(run)
    for kind, title in TITLES.items():
        for d, name in enumerate(DIMENSIONS):
            expected = [metrics_of(DIMENSIONS, step / STEPS)[f"{kind}/{name}"] for step in range(1, STEPS + 1)]
            assert curve(drawn[title], 2 * d) == (list(range(1, STEPS + 1)), expected)
            dots = [metrics_of(DIMENSIONS, share)[f"{kind}/{name}"] for share in (0, 1)]
            assert curve(drawn[title], 2 * d + 1) == ([0, STEPS], dots)
    steps, multipliers = curve(drawn["Multiplier of the margin floor"], 2 * (len(DIMENSIONS) - 1))
    assert multipliers == pytest.approx([0.1 * step / STEPS for step in steps])


def test_course(run: Run, drawn: dict[str, Figure]) -> None:
    course_plots(run)
    shares = [step / STEPS for step in range(1, STEPS + 1)]
    for title, expected in (
        ("Loss", [2.0 - share for share in shares]),
        ("Learning rate", [1e-3 * (1 - share) for share in shares]),
        ("Gradient norm", [2.0] * STEPS),
        ("Throughput", [7000.0] * STEPS),
        ("Imbalance", [1.0 + share / 10 for share in shares]),
    ):
        assert curve(drawn[title], 0)[1] == expected, title


def test_conflict(run: Run, drawn: dict[str, Figure]) -> None:
    conflict_plots(run)
    last = conflict_of(DIMENSIONS, 1.0)
    for kind, title, diagonal in (
        ("batch_cosine", "Cosine of the batch's gradients", 1.0),
        ("record_cosine", "Cosine within a record", 1.0),
        ("record_conflict", "Records in conflict", 0.0),
    ):
        rows, columns, entries = matrix(drawn[title])
        assert rows == columns == NAMES
        for i, a in enumerate(DIMENSIONS):
            for j, b in enumerate(DIMENSIONS):
                expected = diagonal if i == j else last[f"{kind}/{a}/{b}" if i < j else f"{kind}/{b}/{a}"]
                assert entries[i, j] == expected
    norms = drawn["Norm of a dimension's gradient"]
    assert [curve(norms, 2 * d) for d in range(3)] == [([20], [0.05 * (d + 1)]) for d in range(3)]


def test_leakage(run: Run, drawn: dict[str, Figure]) -> None:
    leakage_plots(run)
    assert len(drawn) == 4
    for kind, title in (("leakage_margin", "Margin"), ("leakage_accuracy", "Accuracy")):
        for step in (0, STEPS):
            rows, columns, entries = matrix(drawn[f"{title}, step {step}"])
            assert (rows, columns) == (NAMES[1:], NAMES)
            figures = leakage_of(DIMENSIONS, step / STEPS)
            assert entries.tolist() == [[figures[f"{kind}/{i}/{j}"] for j in DIMENSIONS] for i in DIMENSIONS[1:]]


def test_ledger(run: Run, drawn: dict[str, Figure]) -> None:
    """200 records whose margins lie evenly from -0.5 to 1, by 0.2 more in the second epoch."""
    summary = summarise_ledger(run.folder / "ledger", DIMENSIONS)
    assert summary is not None
    ledger_plots(summary)
    for epoch, when in enumerate(("first", "last")):
        stairs = drawn[f"Margins when {when} trained on"].axes[0].patches
        assert len(stairs) == len(DIMENSIONS)
        for d, one in enumerate(stairs):
            shares, edges, _ = one.get_data()
            margins = np.linspace(-0.5, 1.0, 200) + 0.2 * epoch + 0.01 * d
            assert shares.tolist() == pytest.approx((np.histogram(margins, edges)[0] / 200).tolist(), abs=0.0051)
