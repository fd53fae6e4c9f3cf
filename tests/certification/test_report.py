"""Errors, what exceeds, and the two files; no training."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_amopo.certification.certify import Outcome, limits_of
from megatron_amopo.certification.comparison import Errors, compare, relative_error
from megatron_amopo.certification.layouts import CPU_LAYOUTS, LAYOUTS, Layout
from megatron_amopo.certification.reference import Result
from megatron_amopo.certification.report import JSON, MARKDOWN, environment, write_certificate
from tools import certify as command_line

ROOT = Path(__file__).resolve().parents[2]
SMALL = Errors(1e-7, 1e-7, 1e-9, 1e-6, 1e-7)
TP2, BF16 = Layout("tp2", 2), Layout("bf16", 1, ("--bf16",))
NAN = float("nan")


def result(losses=(1.0, 2.0), gradient=1.0, weight=10.0):
    ones = torch.ones(4)
    return Result(list(losses), {"w": 9 * ones}, {"w": gradient * ones}, {"w": weight * ones})


def test_errors_are_relative():
    errors = compare(result((1.0, 2.2), gradient=1.5, weight=10.1), result(), [1.0], [2.0])
    assert errors.loss == pytest.approx(0.1)
    assert errors.grad == pytest.approx(0.5)
    assert errors.weight == pytest.approx(0.01, rel=1e-5)
    assert errors.moved == pytest.approx(0.1, rel=1e-5)
    assert errors.adam_loss == pytest.approx(0.5)


def test_what_is_no_number_exceeds():
    errors = compare(result((1.0, NAN), gradient=NAN), result(), [1.0], [1.0])
    assert errors.exceeded(SMALL) == ["loss", "grad"]
    assert SMALL.worst_of(errors).exceeded(SMALL) == ["loss", "grad"]
    assert errors.worst_of(SMALL).exceeded(SMALL) == ["loss", "grad"]


def test_other_names_or_lengths_are_errors():
    with pytest.raises(ValueError, match="one side only"):
        relative_error({"a": torch.ones(1)}, {"b": torch.ones(1)})
    with pytest.raises(ValueError, match="1 losses, expected 2"):
        compare(result(losses=(1.0,)), result(), [1.0], [1.0])


def outcome(layout=TP2, one_rank=SMALL, plain=SMALL, **fields):
    return Outcome(layout, limits_of(layout, 1e-5), one_rank=one_rank, plain=plain, **fields)


OUTCOMES = {
    "passed": outcome(),
    "against one rank": outcome(one_rank=replace(SMALL, grad=2e-5)),
    "against plain": outcome(plain=replace(SMALL, loss=NAN)),
    "copies": outcome(copies=1e-3),
    "no numbers": outcome(one_rank=None, plain=None, failure="Traceback …\nConfigError: --fp16 is not supported"),
    "bf16": outcome(BF16, *[replace(SMALL, loss=1e-3, grad=1e-2, moved=0.4)] * 2, plain_bf16=SMALL),
    "bf16 too far": outcome(BF16, *[replace(SMALL, grad=0.2)] * 2, plain_bf16=SMALL),
}


def test_who_passes():
    verdicts = {name: outcome.passed for name, outcome in OUTCOMES.items()}
    assert [name for name, passed in verdicts.items() if passed] == ["passed", "bf16"]


def test_files(tmp_path):
    about = environment(command="tools/certify.py", steps=5, tolerance=1e-5)
    write_certificate(tmp_path / "new" / "folder", list(OUTCOMES.values()), about, {"gpu-tp2": "needs 2 GPU(s)"})
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [JSON, MARKDOWN]

    text = (tmp_path / "new" / "folder" / JSON).read_text()
    data = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity aren't JSON
    assert data["passed"] is False
    assert data["versions"].keys() >= {"torch", "megatron-core", "transformers"}
    assert data["machine"]["cores"] >= 1
    assert data["left_out"] == {"gpu-tp2": "needs 2 GPU(s)"}
    entries = dict(zip(OUTCOMES, data["layouts"] + data["bf16_layouts"], strict=True))
    assert [entry["name"] for entry in data["bf16_layouts"]] == ["bf16", "bf16"]
    assert entries["passed"]["name"] == "tp2"
    assert entries["passed"]["grad_error"] == 1e-7
    assert entries["against one rank"]["grad_error"] == 2e-5  # the worse of the two comparisons
    assert entries["against one rank"]["exceeded"] == ["grad"]
    assert entries["against plain"]["loss_error"] is None
    assert not entries["against plain"]["passed"]
    assert entries["no numbers"]["weight_error"] is None

    page = (tmp_path / "new" / "folder" / MARKDOWN).read_text()
    assert "**2 of 7 layouts passed.**" in page
    assert "**2.0e-05 / 1.0e-07**" in page
    assert page.count("**failed**") == 4
    assert "ConfigError: --fp16 is not supported" in page
    assert "Left out (needs 2 GPU(s)): gpu-tp2." in page


def test_layouts_are_told_apart():
    names = [layout.name for layout in LAYOUTS]
    assert len(set(names)) == len(names)
    assert len(CPU_LAYOUTS) >= 20
    assert {layout.problem.dimensions for layout in CPU_LAYOUTS} == {1, 2, 3, 4, 5, 6}


def test_the_published_certificate_has_all_layouts_of_the_cpu():
    """As they are now: with these flags, of these problems, to the default tolerance, over the default steps."""
    published = json.loads((ROOT / "benchmarks" / "results" / "certificate" / "certificate.json").read_text())
    assert published["passed"]
    assert (published["tolerance"], published["steps"]) == (1e-5, 5)
    for key, bf16 in (("layouts", False), ("bf16_layouts", True)):
        expected = {layout.name: layout for layout in CPU_LAYOUTS if layout.bf16 == bf16}
        assert [entry["name"] for entry in published[key]] == list(expected)
        for entry in published[key]:
            layout = expected[entry["name"]]
            assert entry["flags"] == list(layout.flags)
            assert entry["problem"] == asdict(layout.problem)
            assert entry["ranks"] == layout.ranks


class DeadRanks:
    """In place of ranks: every job fails."""

    def run(self, job, num_ranks, *args, **kwargs):
        raise RuntimeError("Traceback …\nno rank lives")


def test_a_layout_that_cannot_be_computed(tmp_path, capsys):
    arguments = ["--layouts", "tp2,pp2", "--output", str(tmp_path)]
    assert command_line.main(arguments, open_pool=lambda size, gpus: nullcontext(DeadRanks())) == 2
    assert [entry["passed"] for entry in json.loads((tmp_path / JSON).read_text())["layouts"]] == [False, False]
    assert "no rank lives" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "tp2,tp3"], "--layouts: there is no 'tp3'"),
        (["--layouts", ","], "--layouts names none"),
        (["--output", "{file}/certificate"], "--output {file}/certificate: can't be made"),
    ],
)
def test_errors_name_the_flag(arguments, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert command_line.main([argument.format(file=file) for argument in arguments]) == 2
    assert message.format(file=file) in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--tolerance", "nan"], ["--tolerance", "-1"]])
def test_numbers_that_make_no_sense(arguments):
    with pytest.raises(SystemExit) as stop:
        command_line.main(arguments)
    assert stop.value.code == 2


def test_list(capsys):
    assert command_line.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(LAYOUTS)
