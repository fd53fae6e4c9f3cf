"""Commands that README shows without an interpreter in front can be started so; what they say of a full disk."""

import errno
import os
from pathlib import Path

import pytest

from tools.command_line import exit_status

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "tools/prepare_preferences.py",
    "tools/convert_checkpoint.py",
    "tools/find_contradictions.py",
    "tools/certify.py",
    "tools/report.py",
    "tools/sample_answers.py",
    "tools/score_answers.py",
    "tools/check_container.py",
    "examples/try_your_data.sh",
    "examples/qwen2.5_7b.sh",
    "examples/qwen2.5_14b.sh",
    "examples/qwen2.5_32b.sh",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shown_commands_are_executable(script):
    assert os.access(ROOT / script, os.X_OK)
    assert (ROOT / script).read_text().startswith("#!/usr/bin/env ")


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
