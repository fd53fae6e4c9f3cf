"""The stamp that lets the next run skip set-up, starting over, and the Makefile's part."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.machines import ROOT, python_with_torch, script, stand_in
from tools.setup_environment import common

steps = importlib.import_module("tools.setup_environment.__main__")


def test_no_python_and_no_uv_is_explained(env: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(common.SetupError, match=r"no Python 3\.12 or 3\.13(?s:.*)make setup PYTHON="):
        steps.choose_python(env, None, tmp_path / ".venv", tmp_path / "fetched")


@pytest.fixture
def complete(checkout: Path) -> Path:
    """A checkout with a finished `.venv` (with a torch of no content)."""
    python_with_torch(checkout / ".venv", "2.12.0")
    steps.write_stamp(checkout, checkout / ".venv", {"AMOPO_EXTRAS": "dev"})
    return checkout


def is_complete(root: Path, env: dict[str, str]) -> bool:
    return steps.is_complete(steps.read_stamp(root / ".venv"), root, root / ".venv", env)


def test_a_complete_venv_is_not_made_again(
    complete: Path, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (complete / ".venv/setup.json").stat().st_mtime_ns
    steps.set_up(env, complete)
    assert capsys.readouterr().out == f"setup: {complete / '.venv'} is up to date\n"
    assert (complete / ".venv/setup.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["dependencies", "moved", "python gone", "torch gone", "no stamp", "torn stamp"])
def test_what_makes_a_venv_incomplete(complete: Path, env: dict[str, str], change: str) -> None:
    assert is_complete(complete, env)
    own = complete / ".venv"
    if change == "dependencies":
        (complete / "setup.py").write_text("# other dependencies\n")
    elif change == "moved":
        complete = complete.rename(complete.parent / "moved")
    elif change == "python gone":
        (own / "bin/python").unlink()
        (own / "bin/python").symlink_to("/nonexistent/python3")
    elif change == "torch gone":
        next(own.glob("lib/*/site-packages/torch/__init__.py")).unlink()
    elif change == "no stamp":
        (own / "setup.json").unlink()
    else:
        (own / "setup.json").write_text('{"checkout": ')
    assert not is_complete(complete, env)


def test_a_variable_that_is_not_set_asks_for_nothing(complete: Path, env: dict[str, str]) -> None:
    assert is_complete(complete, {**env, "AMOPO_EXTRAS": "dev"})
    assert not is_complete(complete, {**env, "AMOPO_EXTRAS": "dev,plots"})
    assert not is_complete(complete, {**env, "PYTHON": sys.executable})


def test_what_was_asked_for_once_is_kept_when_the_venv_is_made_anew(
    complete: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (complete / "setup.py").write_text((complete / "setup.py").read_text() + "# changed\n")
    extras = []

    def install(env: dict[str, str], own: Path, tools: Path, wanted: str) -> None:
        extras.append(wanted)
        python_with_torch(own, "2.13.0")

    monkeypatch.setattr(steps, "install_fresh", install)
    steps.set_up(env, complete)
    assert extras == ["dev"]
    assert is_complete(complete, {**env, "AMOPO_EXTRAS": "dev"})


def test_an_interrupted_setup_starts_over(checkout: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(env: dict[str, str], own: Path, tools: Path, extras: str) -> None:
        (own / "half").mkdir(parents=True)
        raise KeyboardInterrupt

    def finished(env: dict[str, str], own: Path, tools: Path, extras: str) -> None:
        assert not own.exists()
        python_with_torch(own, "2.12.0")

    monkeypatch.setattr(steps, "install_fresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.set_up(env, checkout)
    assert not is_complete(checkout, env)
    monkeypatch.setattr(steps, "install_fresh", finished)
    steps.set_up(env, checkout)
    assert is_complete(checkout, env)


def test_somebody_elses_venv_is_not_removed(
    checkout: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise common.SetupError("no network")

    monkeypatch.setattr(steps, "install_fresh", fails)
    with pytest.raises(common.SetupError, match="no network"):
        steps.set_up(env, checkout)  # must leave no claim to a `.venv` that it has not made
    (checkout / ".venv").mkdir()
    (checkout / ".venv/notes").write_text("mine")
    with pytest.raises(common.SetupError, match="was not made by `make setup`"):
        steps.set_up(env, checkout)
    assert (checkout / ".venv/notes").read_text() == "mine"


def test_transformer_engine_is_built_against_the_torch_that_loads_it() -> None:
    assert common.install_stages("dev,plots") == [["--editable", ".[dev,plots]"]]
    first, second = common.install_stages("dev,gpu")
    assert first[-1] == ".[dev]"
    assert second == ["--no-build-isolation", "--editable", ".[dev,gpu]"]
    assert common.install_stages("gpu")[0][-1] == "."


def test_make_passes_over_pythons_that_fail(tmp_path: Path) -> None:
    """`make setup` runs the script with the first Python that really runs."""
    root = tmp_path / "my checkout"
    root.mkdir()
    (root / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    stand_in(tmp_path / "bin/python3")
    stand_in(tmp_path / "bin/python3.14")
    script(tmp_path / "bin/python3.13", 'case "$1" in -c) exit 0;; *) echo "ran: $*";; esac')
    done = subprocess.run(
        ["make", "--no-print-directory", "setup"],
        cwd=root,
        env={"PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "ran: -m tools.setup_environment\n"


def test_the_script_runs_on_old_pythons() -> None:
    """Syntax and imports of Python 3.9, so far as the parser can tell."""
    for file in (ROOT / "tools/setup_environment").glob("*.py"):
        ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(3, 9))
