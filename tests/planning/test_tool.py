"""``tools/plan_training.py`` from the command line to its exit status, tables and JSON."""

from __future__ import annotations

import json

import pytest

from megatron_amopo.certification.tiny import make_data
from tests.support.published_configs import PUBLISHED
from tools.plan_training import main

NUMBERS = ["--dimensions", "3", "--prompt-tokens", "400", "--response-tokens", "300"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "Qwen3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-8B"].config))
    return folder


def test_a_plan(model, tmp_path, capsys):
    report = tmp_path / "plan.json"
    assert main([str(model), *NUMBERS, "--gpus", "8", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    for part in ("Best layouts", "GiB per GPU", "torchrun --nproc-per-node 8 -m megatron_amopo.train", "Assumptions"):
        assert part in printed
    found = json.loads(report.read_text())
    assert found["estimates"] is True
    best = found["best"][0]
    assert best["step_seconds"] == pytest.approx(sum(best["step_parts_seconds"].values()))
    assert best["peak_memory_bytes"] == max(stage["total"] for stage in best["memory_bytes_by_stage"])
    usable = found["gpu"]["memory_bytes"] * 0.95
    assert best["spare_memory_bytes"] == pytest.approx(usable - best["peak_memory_bytes"])
    assert f"usable GiB are taken, {best['spare_memory_bytes'] / 2**30:.1f} to spare" in " ".join(printed.split())
    assert best["command"][:3] == ["torchrun", "--nproc-per-node", "8"]
    assert {refusal["by"] for refusal in found["refused"]} <= {"megatron-amopo", "Megatron"}


def test_prepared_data(model, tmp_path, capsys):
    make_data(tmp_path / "data")
    command = [str(model / "config.json"), "--data", str(tmp_path / "data"), "--gpus", "4", "--global-batch-size", "8"]
    assert main([*command, "--precision-aware-optimizer"]) == 0
    assert "24 records of 3 dimensions" in capsys.readouterr().out


def test_nothing_fits(model, capsys):
    assert main([str(model), *NUMBERS, "--gpus", "1"]) == 1
    printed = capsys.readouterr().out
    assert "No layout can be run" in printed
    assert "the smallest layout" in printed


def test_growth_and_its_plot(model, tmp_path, capsys):
    plot, report = tmp_path / "growth.png", tmp_path / "growth.json"
    command = [str(model), *NUMBERS, "--scaling", "--tp", "2", "--cp", "1", "--pp", "1"]
    assert main([*command, "--plot", str(plot), "--json", str(report)]) == 0
    assert "Same global batch" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(report.read_text())
    assert [row["gpus"] for row in found["fixed_batch"]] == [16, 32, 64, 128, 256, 512, 1024]
    assert "is not a multiple of" in found["fixed_batch"][-1]["reason"]  # 512 data-parallel ranks share 64 records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8"], "--dimensions, --prompt-tokens, --response-tokens missing: give --data"),
        ([*NUMBERS, "--data", "somewhere"], "--data and --dimensions, --prompt-tokens, --response-tokens both"),
        ([*NUMBERS, "--gpus", "0"], "--gpus is 0"),
        ([*NUMBERS, "--tp", "0"], "--tensor-model-parallel-size is 0"),
        ([*NUMBERS, "--gpu", "h900"], "--gpu h900 is not known; known: a100, h100"),
        ([*NUMBERS, "--headroom", "1"], "--headroom is 1.0"),
        ([*NUMBERS, "--shared-tokens", "400"], "--shared-tokens is 400"),
        (["--data", "nowhere"], "no prepared data at nowhere"),
        ([*NUMBERS, "--json", f"{__file__}/plan.json"], "test_tool.py/plan.json"),
    ],
)
def test_errors_are_one_line(model, arguments, message, capsys):
    assert main([str(model), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_usage(model, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(model), *NUMBERS, "--plot", "growth.png"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main([str(model), *NUMBERS, "--scaling", "--gpus", "8"])
    assert "--scaling is over numbers of GPUs of its own" in capsys.readouterr().err
    assert main([str(model / "missing"), *NUMBERS]) == 2
    assert "missing: no such folder" in capsys.readouterr().err


def test_neither_megatron_nor_a_gpu_is_needed(model):
    """In a process of its own: planning must not wait for Megatron."""
    import subprocess
    import sys

    code = (
        "import sys; from tools.plan_training import main; "
        f"assert main({[str(model), *NUMBERS]!r}) == 0; "
        "assert not [name for name in sys.modules if name.split('.')[0] in ('megatron', 'transformers', 'matplotlib')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
