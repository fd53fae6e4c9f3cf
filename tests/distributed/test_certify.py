"""The certificate from end to end: a few layouts pass, and each kind of wrong result is found."""

import json
from contextlib import nullcontext

import pytest

from megatron_amopo.certification.observed_run import train
from megatron_amopo.certification.report import JSON, MARKDOWN
from tests.support.jobs_wrong import other_gamma, ranks_apart, scaled_loss
from tools import certify


def run(ranks, output, layouts, job=train):
    """Exit code, entries by layout and page."""
    code = certify.main(
        ["--layouts", layouts, "--steps", "2", "--output", str(output)],
        open_pool=lambda size, gpus: nullcontext(ranks),
        job=job,
    )
    data = json.loads((output / JSON).read_text())
    entries = [*data["layouts"], *data["bf16_layouts"]]
    return code, {entry["name"]: entry for entry in entries}, (output / MARKDOWN).read_text()


def test_certificate(ranks, tmp_path):
    names = ["tp2", "cp2-dp2-distributed-optimizer", "bf16-tp2-sp"]
    code, entries, page = run(ranks, tmp_path, ",".join(names))
    assert code == 0
    assert list(entries) == names
    for name in names[:-1]:
        for kind in ("loss_error", "grad_error", "weight_error", "adam_loss_error"):
            assert 0 <= entries[name][kind] <= 1e-5
        assert entries[name]["against_plain"]["grad"] > 0  # two computations, not one with itself
    assert entries["bf16-tp2-sp"]["grad_error"] > 1e-4  # it did compute in bf16
    assert entries["bf16-tp2-sp"]["plain_bf16_against_plain"]["grad"] > 1e-4
    assert "**3 of 3 layouts passed.**" in page
    assert all(f"| {name} |" in page for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == [JSON, MARKDOWN]


@pytest.mark.parametrize(
    ("job", "comparison", "exceeded"),
    [
        (scaled_loss, "against_one_rank", {"grad"}),
        (other_gamma, "against_plain", {"loss", "grad", "moved", "adam_loss"}),
        (ranks_apart, None, {"copies"}),
    ],
)
def test_a_wrong_result_is_found(ranks, tmp_path, capsys, job, comparison, exceeded):
    code, entries, page = run(ranks, tmp_path, "tp2", job)
    entry = entries["tp2"]
    assert code == 1
    assert not entry["passed"]
    assert set(entry["exceeded"]) >= exceeded
    if comparison is not None:
        assert {kind for kind in exceeded if entry[comparison][kind] > entry["limits"][kind]} == exceeded
    assert "**0 of 1 layouts passed.**" in page
    assert "**failed**" in page
    assert "tp2: " in capsys.readouterr().err
