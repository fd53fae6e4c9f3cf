"""Which Python is taken on machines of all kinds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.machines import fake_python, stand_in
from tools.setup_environment import common, pythons


def search(env: dict[str, str], tmp_path: Path) -> tuple[pythons.Python | None, list[str]]:
    return pythons.find_python(pythons.candidates(env, tmp_path / ".venv", tmp_path / "fetched"))


def test_a_stand_in_is_passed_over_for_the_version_managers_folder(env: dict[str, str], tmp_path: Path) -> None:
    fake_python(tmp_path / "shims/python3", (3, 11, 7))
    broken = stand_in(tmp_path / "shims/python3.12")
    good = fake_python(Path(env["HOME"]) / ".pyenv/versions/3.12.1/bin/python3", (3, 12, 1))
    found, passed_over = search({**env, "PATH": str(tmp_path / "shims")}, tmp_path)
    assert found is not None
    assert (found.path, found.version) == (str(good), (3, 12, 1))
    assert passed_over == [f"{broken} does not run"]


def test_a_stand_in_hides_no_python_behind_it_on_path(env: dict[str, str], tmp_path: Path) -> None:
    stand_in(tmp_path / "shims/python3.12")
    good = fake_python(tmp_path / "real/python3.12")
    found, _ = search({**env, "PATH": f"{tmp_path / 'shims'}{os.pathsep}{tmp_path / 'real'}"}, tmp_path)
    assert found is not None
    assert found.path == str(good)


def test_pyenv_root_wins_over_the_usual_folder(env: dict[str, str], tmp_path: Path) -> None:
    fake_python(Path(env["HOME"]) / ".pyenv/versions/3.12.1/bin/python3")
    good = fake_python(tmp_path / "elsewhere/versions/3.13.0/bin/python3", (3, 13, 0))
    found, _ = search({**env, "PYENV_ROOT": str(tmp_path / "elsewhere")}, tmp_path)
    assert found is not None
    assert found.path == str(good)


def test_a_python_built_without_lzma_is_passed_over(env: dict[str, str], tmp_path: Path) -> None:
    fake_python(tmp_path / "bin/python3.12", lacking=("lzma",))
    good = fake_python(tmp_path / "bin/python3.13", (3, 13, 1))
    found, passed_over = search({**env, "PATH": str(tmp_path / "bin")}, tmp_path)
    assert found is not None
    assert found.path == str(good)
    assert passed_over == [f"{tmp_path / 'bin/python3.12'} was built without lzma"]


@pytest.mark.parametrize("version", [(3, 11, 9), (3, 14, 0)])
def test_versions_without_wheels_are_not_taken(
    env: dict[str, str], tmp_path: Path, version: tuple[int, int, int]
) -> None:
    fake_python(tmp_path / "bin/python3", version)
    assert search({**env, "PATH": str(tmp_path / "bin")}, tmp_path) == (None, [])


def test_conda_and_fetched_pythons_are_found(env: dict[str, str], tmp_path: Path) -> None:
    conda = fake_python(Path(env["HOME"]) / "miniconda3/envs/py312/bin/python3")
    found, _ = search(env, tmp_path)
    assert found is not None
    assert found.path == str(conda)
    fetched = fake_python(tmp_path / "fetched/cpython-3.12.9-linux-x86_64-gnu/bin/python3")
    found, _ = search(env, tmp_path)
    assert found is not None
    assert found.path == str(fetched)


def test_our_own_venv_is_no_candidate(env: dict[str, str], tmp_path: Path) -> None:
    fake_python(tmp_path / ".venv/bin/python3")
    active = {**env, "VIRTUAL_ENV": str(tmp_path / ".venv"), "PATH": str(tmp_path / ".venv/bin")}
    assert search(active, tmp_path) == (None, [])
    assert list(pythons.current_pythons(active, tmp_path / ".venv")) == []


def test_a_real_python_is_probed() -> None:
    found = pythons.probe(sys.executable)
    assert found is not None
    assert found.version == sys.version_info[:3]
    assert (found.prefix, found.base_prefix) == (sys.prefix, sys.base_prefix)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("stand-in", "does not run"),
        ("old", "needs 3.12 or newer"),
        ("poor", "built without ssl"),
        ("absent", "does not run"),
    ],
)
def test_the_python_that_is_asked_for_must_do(env: dict[str, str], tmp_path: Path, asked: str, message: str) -> None:
    stand_in(tmp_path / "bin/stand-in")
    fake_python(tmp_path / "bin/old", (3, 11, 9))
    fake_python(tmp_path / "bin/poor", lacking=("ssl",))
    with pytest.raises(common.SetupError, match=message):
        pythons.asked_python({**env, "PATH": str(tmp_path / "bin"), "PYTHON": asked})
