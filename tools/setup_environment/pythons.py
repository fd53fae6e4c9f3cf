"""Which Pythons this machine has, and whether the current one already has torch.

A Python counts only after it has been run: version managers put stand-ins on PATH that fail, and home-built Pythons
lack modules. Nothing here changes anything on the machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .common import SetupError, answer, dotted

MINIMUM = (3, 12)
WITH_WHEELS = ((3, 12), (3, 13))  # what megatron-core 0.19 has wheels for; another Python is used only when asked for

# Run in the Python under examination. The modules are those that torch, pandas and the like import and a home-built
# Python may lack, and what makes a virtual environment.
_PROBE = """
import importlib.util, json, sys
lacking = []
for name in ("bz2", "ctypes", "lzma", "multiprocessing", "ssl", "venv", "zlib"):
    try:
        __import__(name)
    except ImportError:
        lacking.append(name)
torch = importlib.util.find_spec("torch")
print(json.dumps([sys.version_info[:3], sys.prefix, sys.base_prefix, lacking, bool(torch and torch.origin)]))
"""
_TORCH = "import json, torch; print(json.dumps([torch.__version__, torch.__file__]))"
_PACKAGES = """
import importlib.metadata, json, sys
places = [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
found = [(package.metadata["Name"], package.version) for package in importlib.metadata.distributions(path=places)]
print(json.dumps([places, found]))
"""


@dataclass(frozen=True)
class Python:
    """An interpreter that ran."""

    path: str
    version: tuple[int, int, int]
    prefix: str
    base_prefix: str
    lacking: tuple[str, ...]  # modules it was built without
    has_torch: bool  # torch is on its path; whether it can be imported is another question

    @property
    def is_virtual(self) -> bool:
        return self.prefix != self.base_prefix

    def __str__(self) -> str:
        return f"Python {dotted(self.version)} ({self.path})"


@dataclass(frozen=True)
class Torch:
    """torch as an interpreter imports it."""

    version: str
    file: str

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


def probe(path: str | Path) -> Python | None:
    """The interpreter at `path`, or None if it does not run or is no Python 3."""
    try:
        version, prefix, base_prefix, lacking, has_torch = json.loads(answer([str(path), "-c", _PROBE]) or "")
        major, minor, micro = version
    except ValueError:
        return None
    return Python(str(path), (major, minor, micro), prefix, base_prefix, tuple(lacking), has_torch)


def import_torch(path: str | Path) -> Torch | None:
    """torch as that interpreter imports it, or None if that fails."""
    try:
        version, file = json.loads(answer([str(path), "-c", _TORCH], timeout=600) or "")
    except ValueError:
        return None
    return Torch(version, file)


def packages_of(path: str | Path) -> tuple[list[str], dict[str, str]]:
    """That interpreter's package folders, and its packages by normalised name with their versions."""
    try:
        places, found = json.loads(answer([str(path), "-c", _PACKAGES], timeout=300) or "")
    except ValueError as error:
        raise SetupError(f"{path} cannot list its packages") from error
    names: dict[str, str] = {}
    for name, version in found:
        if name and version:  # a broken installation has neither
            names.setdefault(normalised(name), version)  # the first on the path is the one that is imported
    return places, names


def normalised(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_python(env: Mapping[str, str]) -> Python | None:
    """The Python that PYTHON names, None if it is not set; SetupError if it does not run or does not do."""
    asked = env.get("PYTHON")
    if not asked:
        return None
    python = probe(shutil.which(asked, path=env.get("PATH")) or asked)
    if python is None:
        raise SetupError(f"PYTHON={asked} does not run")
    if python.version[:2] < MINIMUM:
        raise SetupError(f"PYTHON={asked} is {python}; this project needs {dotted(MINIMUM)} or newer")
    if python.lacking:
        raise SetupError(f"PYTHON={asked} was built without {', '.join(python.lacking)}")
    return python


def current_pythons(env: Mapping[str, str], own_venv: Path) -> Iterator[Python]:
    """The Pythons that a person at this prompt would call theirs; not our own `.venv`, should it be activated."""
    for path in dict.fromkeys(_active(env) + on_path("python3", env) + on_path("python", env)):
        if own_venv not in path.parents:
            found = probe(path)
            if found is not None:
                yield found


def candidates(env: Mapping[str, str], own_venv: Path, fetched: Path) -> list[Path]:
    """Where a Python 3.12 or 3.13 may be, the likeliest first; `fetched` is the folder of those that uv fetched."""
    home = home_of(env)
    names = [f"python{dotted(version)}" for version in WITH_WHEELS]
    paths = _active(env)
    for name in ("python3", *names, "python"):
        paths += on_path(name, env)
    paths += [Path(folder, name) for folder in ("/usr/local/bin", "/usr/bin") for name in names]
    for folder in (
        Path(env.get("PYENV_ROOT") or home / ".pyenv", "versions"),
        fetched,
        Path(env.get("UV_PYTHON_INSTALL_DIR") or home / ".local/share/uv/python"),
        home / ".asdf/installs/python",
        home / ".local/share/mise/installs/python",
        Path("/opt/python"),
    ):
        for version in WITH_WHEELS:
            for start in ("", "cpython-"):
                paths += sorted(folder.glob(f"{start}{dotted(version)}*/bin/python3"), reverse=True)
    conda = [Path(env["CONDA_EXE"]).parent.parent] if env.get("CONDA_EXE") else []
    conda += [home / name for name in ("miniconda3", "miniforge3", "mambaforge", "anaconda3")] + [Path("/opt/conda")]
    for folder in conda:
        paths += [folder / "bin/python3", *sorted(folder.glob("envs/*/bin/python3"))]
    return [path for path in dict.fromkeys(paths) if own_venv not in path.parents]


def find_python(paths: list[Path]) -> tuple[Python | None, list[str]]:
    """The first of `paths` that runs, is 3.12 or 3.13 and lacks nothing; and why those that came near did not do."""
    passed_over = []
    for path in paths:
        if not path.exists():
            continue
        found = probe(path)
        if found is None:
            passed_over.append(f"{path} does not run")
        elif found.version[:2] in WITH_WHEELS:
            if not found.lacking:
                return found, passed_over
            passed_over.append(f"{path} was built without {', '.join(found.lacking)}")
    return None, passed_over


def on_path(name: str, env: Mapping[str, str]) -> list[Path]:
    """Every program of that name on PATH, not just the first: a stand-in that fails may hide one that works."""
    folders = [folder for folder in env.get("PATH", "").split(os.pathsep) if folder]
    return [path for path in (Path(folder, name) for folder in folders) if os.access(path, os.X_OK)]


def home_of(env: Mapping[str, str]) -> Path:
    """HOME, or a folder that does not exist where it is not set."""
    return Path(env.get("HOME") or "/nonexistent")


def _active(env: Mapping[str, str]) -> list[Path]:
    return [Path(env[name], "bin", "python") for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if env.get(name)]
