"""The commands that README shows without an interpreter in front can be started so."""

import os
from pathlib import Path

import pytest

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
