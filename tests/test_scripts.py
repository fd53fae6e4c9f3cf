"""Commands that README shows without an interpreter in front can be started so; what they say of a full disk."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.command_line import exit_status

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()
)
HELPFUL = [program for program in PROGRAMS if program != "tools/check_container.py"]  # which takes no arguments
SCRIPTS = [*PROGRAMS, *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shown_commands_are_executable(script):
    assert os.access(ROOT / script, os.X_OK)
    assert (ROOT / script).read_text().startswith("#!/usr/bin/env ")


@pytest.mark.slow
@pytest.mark.parametrize("program", HELPFUL)
def test_programs_start_from_any_folder(program, tmp_path):
    """In the environment that `make setup` makes, where the folders of the repository aren't on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, ROOT / program, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", "scores"), "scores: No space left on device"),
        (OSError("no file system"), "no file system"),
    ],
)
def test_errors_of_disks_are_said_in_a_line(error, said, capsys):
    """A write that finds the disk full doesn't know which file it was."""

    def fail() -> int:
        raise error

    assert exit_status(fail) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
