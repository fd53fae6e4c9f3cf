"""Pythons, stand-ins and images' torches, played by small scripts and empty packages, for the tests of set-up."""

from __future__ import annotations

import json
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def stand_in(path: Path) -> Path:
    """What a version manager puts on PATH for a version that is not selected: it exists, and fails."""
    return script(path, 'echo "pyenv: python3.12: command not found" >&2; exit 127')


def fake_python(path: Path, version: tuple[int, int, int] = (3, 12, 4), lacking: tuple[str, ...] = ()) -> Path:
    """Answers the probe as a Python of that version would, without torch."""
    answer = json.dumps([version, "/usr", "/usr", lacking, False])
    return script(path, f"echo '{answer}'")


def python_with_torch(folder: Path, version: str, others: tuple[str, ...] = (), *, with_pip: bool = False) -> Path:
    """A virtual environment whose torch is an empty package of that version, as are the others."""
    venv.create(folder, with_pip=with_pip, symlinks=True)
    for name in ("torch", *others):
        package(folder, name, version)
    return folder / "bin" / "python"


def package(environment: Path, name: str, version: str) -> None:
    """An empty package in a virtual environment."""
    packages = next(environment.glob("lib/python3*/site-packages"))
    (packages / name).mkdir()
    (packages / name / "__init__.py").write_text(f"__version__ = {version!r}\n", encoding="utf-8")
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
