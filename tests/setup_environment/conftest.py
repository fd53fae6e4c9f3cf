"""An empty machine and a checkout on it; both at paths with a space."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from tests.support.machines import ROOT
from tools.setup_environment import pythons


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A machine with nothing on it but a home, whose path has a space."""
    home = tmp_path / "my home"
    home.mkdir()
    return {"HOME": str(home), "PATH": ""}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What set-up reads of a checkout, at a path with a space."""
    root = tmp_path / "my checkout"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    return root


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the search to the folders that `env` names: no Python of this machine's /usr/bin, /opt."""
    found = pythons.candidates
    ours = (os.sep + "usr" + os.sep, os.sep + "opt" + os.sep)
    monkeypatch.setattr(
        pythons, "candidates", lambda *args: [path for path in found(*args) if not str(path).startswith(ours)]
    )
    monkeypatch.setattr(importlib.import_module("tools.setup_environment.__main__"), "candidates", pythons.candidates)
