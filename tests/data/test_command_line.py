"""The command line: results for people, errors without a traceback, and no trace of a run that was stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_amopo.data.dataset import PreparedGroups
from tests.data.conftest import native, write_lines
from tools.prepare_preferences import main, parse_options

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "prepare_preferences.py"


@pytest.fixture
def arguments(tmp_path, tokenizer_dir):
    path = write_lines(tmp_path / "in.jsonl", [native(f"Question {i}?") for i in range(20)])
    return [
        str(path),
        "--output",
        str(tmp_path / "out"),
        "--tokenizer",
        str(tokenizer_dir),
        "--dimensions",
        "a,b",
        "--workers",
        "1",
    ]


def test_flags_become_options(arguments):
    options = parse_options(
        [*arguments, "--source-scale=-1-4.5", "--choose", "weighted", "--weights", "a=2,b=0.5", "--cutoff-len", "0"]
    )
    assert options.source_scale == (-1.0, 4.5)
    assert options.weights == {"a": 2.0, "b": 0.5}
    assert options.cutoff_len is None
    assert options.dimensions == ("a", "b")


def test_it_prints_what_became_of_the_records(arguments, tmp_path, capsys):
    write_lines(tmp_path / "in.jsonl", [native(), native(chosen_scores=(9, 9))])
    assert main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 rows read; kept 1 train; dropped 1" in out
    assert "score_out_of_scale" in out
    assert len(PreparedGroups.open(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--source-scale", "4"], "--source-scale 4: two numbers"),
        (["--source-scale", "1.2.3-4"], "--source-scale"),
        (["--source-scale", "4-0"], "--source-scale"),
        (["--choose", "weighted", "--weights", "a"], "--weights a: name=number"),
        (["--weights", "a=1,b=1"], "--choose weighted go together"),
        (["--prompts", "none.yaml"], "--prompts none.yaml"),
        (["--tokenizer", "none"], "--tokenizer none"),
        (["--validation-fraction", "2"], "--validation-fraction 2.0"),
        (["--validation-file", "none"], "none: can't be read"),
        (["--dimensions", "a,a"], "--dimensions a,a"),
        (["--rewards", "x,x"], "--rewards x,x: a name is given twice"),
        (["--rewards", "x,"], "--rewards: name at least one"),
        (["--rewards", "x"], "missing_reward"),
        (["--dimensions", "zest"], "no 'zest' (has a, b)"),
        (["--format", "trl"], "no record is left"),
    ],
)
def test_errors_are_one_message(arguments, tmp_path, capsys, change, says):
    assert main([*arguments, *change]) == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert "error: " in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial*"))


def test_an_input_that_is_no_file(arguments, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    for path, says in [
        (tmp_path, "is a folder"),
        (tmp_path / "no.jsonl", "can't be read"),
        (tmp_path / "empty.jsonl", "is empty"),
    ]:
        assert main([str(path), *arguments[1:]]) == 2
        assert says in capsys.readouterr().err


def test_an_output_that_exists_needs_force(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "pass --force to replace it" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert len(PreparedGroups.open(tmp_path / "out")) == 20


def environment(**changes):
    return {**os.environ, "PYTHONPATH": "", **changes}


def test_it_needs_no_home_and_no_network(arguments, tmp_path):
    """HOME can't be written (it is a file), and any use of the hub or of a cache would fail."""
    home = tmp_path / "home"
    home.touch()
    environ = environment(HOME=str(home), HF_HUB_OFFLINE="1", HF_HOME=str(home / "hf"))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environ, cwd="/", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "20 rows read; kept 20 train" in result.stdout
    assert len(PreparedGroups.open(tmp_path / "out")) == 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing(arguments, tmp_path, number):
    write_lines(tmp_path / "in.jsonl", [native(f"Question {i}? " * 40) for i in range(40_000)])
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments[:-1], "2"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial-*/train/*.arrow")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
