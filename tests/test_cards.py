"""Verification cards (docs/cards) say what was checked, on what and when, and nothing that they can't show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "docs" / "cards"
#: What each card is of.
SUBJECTS = {
    "qwen2.5_7b": "examples/qwen2.5_7b.sh",
    "qwen2.5_14b": "examples/qwen2.5_14b.sh",
    "qwen2.5_32b": "examples/qwen2.5_32b.sh",
    "slurm": "examples/slurm/train.sbatch",
    "kubernetes": "examples/kubernetes/pytorchjob.yaml",
    "container": "Dockerfile",
    "quickstart": "examples/quickstart.sh",
    "try_your_data": "examples/try_your_data.sh",
}
NEVER = "**never run**"
#: What a card of a training script has to take a stand on.
TRAINING = ("dry run", "bf16 flags", "FP8 flags", "memory per GPU", "step time", "last ten steps", "export verified")


def rows(card: str) -> list[list[str]]:
    """Cells of the table's rows: check, how, result, machine, date, commit."""
    table = [line for line in (CARDS / f"{card}.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["check", "how", "result", "machine", "date", "commit"]
    return cells[1:]


def test_every_script_has_a_card():
    scripts = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*.sh")}
    scripts |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*/*.sbatch")}
    scripts |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/kubernetes/*.yaml")}
    assert scripts | {"Dockerfile"} == set(SUBJECTS.values())
    assert {path.stem for path in CARDS.glob("*.md")} == set(SUBJECTS)


@pytest.mark.parametrize("card", SUBJECTS)
def test_a_card_claims_what_it_can_show(card):
    text = (CARDS / f"{card}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# Verification card: {SUBJECTS[card]}\n")
    assert "```bash" in text
    assert "Last metrics:" in text
    for check, how, result, machine, date, commit in rows(card):
        assert check
        assert how
        if result == NEVER:
            assert (machine, date, commit) == ("–", "–", "–")
            continue
        assert result == "passed"
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
        assert re.fullmatch(r"[0-9a-f]{7,40}", commit)
        assert machine
        for file, test in re.findall(r"(tests/\S+\.py)::(\w+)", how):
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")
    if card.startswith("qwen"):
        for subject in TRAINING:
            assert any(subject in row[0] for row in rows(card)), subject
