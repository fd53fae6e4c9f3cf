"""uv is found, and told of pip's sources where it has none of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.machines import script
from tools.setup_environment import uv


def write_pip_conf(env: dict[str, str], text: str) -> None:
    file = Path(env["HOME"]) / ".config/pip/pip.conf"
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")


@pytest.fixture
def _no_machine_wide_pip_conf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the files under HOME, whatever /etc says on the machine that runs the tests."""
    read = uv.configparser.RawConfigParser.read
    monkeypatch.setattr(
        uv.configparser.RawConfigParser,
        "read",
        lambda self, file, encoding: [] if str(file).startswith("/etc") else read(self, file, encoding),
    )


@pytest.mark.usefixtures("_no_machine_wide_pip_conf")
def test_pips_mirror_is_handed_on_to_uv(env: dict[str, str]) -> None:
    write_pip_conf(
        env,
        "[global]\nindex-url = https://me:secret@mirror.example/simple\ncert = /a path/ca.pem\n"
        "[install]\nfind-links =\n    /wheels\n    /more\nextra_index_url = https://a.example https://b.example\n",
    )
    merged, handed_on = uv.uv_environment({**env, "PIP_TRUSTED_HOST": "mirror.example", "PIP_NO_INDEX": "0"})
    assert merged["UV_DEFAULT_INDEX"] == "https://me:secret@mirror.example/simple"
    assert merged["SSL_CERT_FILE"] == "/a path/ca.pem"
    assert merged["UV_FIND_LINKS"] == "/wheels,/more"
    assert merged["UV_INDEX"] == "https://a.example https://b.example"
    assert merged["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert merged["UV_INSECURE_HOST"] == "mirror.example"
    assert set(handed_on) == {"index-url", "cert", "find-links", "extra-index-url", "trusted-host"}
    assert "secret" not in " ".join(handed_on)


@pytest.mark.usefixtures("_no_machine_wide_pip_conf")
def test_a_folder_of_wheels_is_all_there_is_without_an_index(env: dict[str, str]) -> None:
    write_pip_conf(env, "[global]\nindex-url = https://mirror.example/simple\nextra-index-url = https://a.example\n")
    merged, handed_on = uv.uv_environment({**env, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"})
    assert merged["UV_FIND_LINKS"] == "/wheels"
    assert merged["UV_DEFAULT_INDEX"].startswith("file:///nonexistent")
    assert "UV_INDEX" not in merged
    assert sorted(handed_on) == ["find-links", "no-index"]


@pytest.mark.usefixtures("_no_machine_wide_pip_conf")
def test_pips_variables_win_over_its_files(env: dict[str, str]) -> None:
    write_pip_conf(env, "[global]\nindex-url = https://file.example/simple\n")
    assert uv.pip_settings(env)["index-url"] == "https://file.example/simple"
    assert uv.pip_settings({**env, "PIP_INDEX_URL": "https://var.example"})["index-url"] == "https://var.example"
    assert uv.pip_settings({**env, "PIP_CONFIG_FILE": os.devnull}) == {"config-file": os.devnull}


@pytest.mark.usefixtures("_no_machine_wide_pip_conf")
@pytest.mark.parametrize("own", ["variable", "file"])
def test_uvs_own_configuration_is_left_alone(env: dict[str, str], own: str) -> None:
    write_pip_conf(env, "[global]\nindex-url = https://mirror.example/simple\n")
    if own == "variable":
        env["UV_INDEX"] = "https://uv.example/simple"
    else:
        (Path(env["HOME"]) / ".config/uv").mkdir()
        (Path(env["HOME"]) / ".config/uv/uv.toml").write_text("")
    assert uv.uv_environment(env) == (env, [])


def test_an_old_or_broken_uv_is_not_used(env: dict[str, str], tmp_path: Path) -> None:
    script(tmp_path / "broken/uv", "exit 1")
    script(tmp_path / "old/uv", "echo uv 0.4.9")
    good = script(tmp_path / "fetched/bin/uv", "echo 'uv 0.5.1 (abc 2024-11-08)'")
    here = {**env, "PATH": f"{tmp_path / 'broken'}{os.pathsep}{tmp_path / 'old'}"}
    assert uv.find_uv(here, tmp_path / "fetched") == str(good)
    assert uv.find_uv(here, tmp_path / "nothing") is None
