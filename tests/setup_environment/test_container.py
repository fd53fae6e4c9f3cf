"""The container as far as it can be tried without Docker: what Dockerfile says, and its pip step beside packages of the
image's versions. Linting is `make lint`'s.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.machines import ROOT, package, python_with_torch
from tools import check_container
from tools.setup_environment import system_torch

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
#: Of nvcr.io/nvidia/pytorch:26.06-py3; docs/container.md says from where that is known. apex, triton and flash-attn are
#: there in versions that make no difference here.
IMAGE = {
    "numpy": "2.1.0",
    "transformer_engine": "2.16.0+4220403e",
    "apex": "0.1",
    "triton": "3.7.0",
    "flash_attn": "2.7.4.post1",
    "PyYAML": "6.0.1",
}
TORCH = "2.13.0a0+8145d630e8.nv26.6.54250401"


def instructions(name: str) -> list[str]:
    joined = re.sub(r"\\\n", " ", DOCKERFILE)
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_the_base_is_pinned_and_documented():
    (base,) = [text for text in instructions("ARG") if text.startswith("BASE=")]
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", base)
    tag, digest = base.removeprefix("BASE=").split("@")
    documented = (ROOT / "docs" / "container.md").read_text(encoding="utf-8")
    for fact in (tag, digest, TORCH.split(".nv")[0], IMAGE["transformer_engine"], IMAGE["numpy"]):
        assert fact in documented


def test_it_does_not_run_as_root_and_ends_with_its_check():
    assert instructions("USER") == ["${UID}"]
    assert "UID=10001" in instructions("ARG")  # a number: Kubernetes' runAsNonRoot looks no names up
    assert instructions("RUN")[-1] == "python tools/check_container.py"
    assert DOCKERFILE.index("USER ") < DOCKERFILE.index("RUN python tools/check_container.py")


def test_what_is_copied_is_there_and_in_the_context():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for copied in instructions("COPY"):
        *sources, _ = shlex.split(copied)
        for source in sources:
            assert (ROOT / source).exists()
            assert source == "." or f"!{Path(source).parts[0]}" in ignored


def test_the_check_tells_the_images_modules_from_ours(tmp_path, monkeypatch):
    for environment, name in (("image", "of_the_image"), ("ours", "of_ours")):
        package(python_with_torch(tmp_path / environment, TORCH).parent.parent, name, "1.0")
        monkeypatch.syspath_prepend(next((tmp_path / environment).glob("lib/python3*/site-packages")))
    monkeypatch.setattr(check_container.sys, "prefix", str(tmp_path / "ours"))
    (line,) = check_container.check_modules({"of_the_image": "of_the_image"}, inside=False)
    assert line.split() == ["of_the_image", "1.0", str(next((tmp_path / "image").glob("lib/*/*/of_the_image")))]
    assert len(check_container.check_modules({"of_ours": "of_ours"}, inside=True)) == 1
    with pytest.raises(check_container.NotAsBuilt, match=r"of_ours 1\.0 comes from .*, not from the image"):
        check_container.check_modules({"of_ours": "of_ours"}, inside=False)
    with pytest.raises(check_container.NotAsBuilt, match="of_nobody can't be imported"):
        check_container.check_modules({"of_nobody": "of_nobody"}, inside=False)


def test_the_check_reads_the_launch_scripts():
    for script in check_container.SCRIPTS:
        flags = check_container.training_flags(ROOT / "examples" / script)
        assert flags[:2] == ["--amopo-data", "OUTPUT/data"]


@pytest.mark.slow
def test_the_pip_step_installs_beside_the_image_and_replaces_nothing(env, tmp_path, monkeypatch):
    """The step itself, in a copy of exactly the files that it sees, with packages that claim the image's versions."""
    python = python_with_torch(tmp_path / "image", TORCH, with_pip=True)
    for name, version in IMAGE.items():
        package(tmp_path / "image", name, version)
    reach = [str(python), "-m", "pip", "download", "--no-deps", "--retries", "0", "--timeout", "10"]
    reached = subprocess.run([*reach, "--dest", str(tmp_path), "tqdm"], capture_output=True, text=True)
    if reached.returncode != 0:
        pytest.skip("no package index can be reached")

    checkout = tmp_path / "opt"
    before, _ = DOCKERFILE.split("RUN python3 -m tools.setup_environment")
    for copied in re.findall(r"^COPY (.*)$", before, re.MULTILINE):
        *sources, target = shlex.split(copied)
        (checkout / target).mkdir(parents=True, exist_ok=True)
        for source in sources:
            if (ROOT / source).is_dir():  # Docker copies what is in it
                shutil.copytree(ROOT / source, checkout / target, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, checkout / target)
    output = []

    def run(command, environment, failure):
        if "pip" in command:
            command = [*command, "--dry-run"]
            command.remove("--quiet")
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        output.append(done.stdout)

    monkeypatch.setattr(system_torch, "run", run)
    here = {**os.environ, **env, "PATH": f"{python.parent}:/usr/bin:/bin"}
    found = system_torch.find_system_torch(here, checkout / ".venv")
    assert found is not None
    (extras,) = re.findall(r"AMOPO_EXTRAS=(\S+)", DOCKERFILE)
    system_torch.install_beside(*found, checkout / ".venv", extras, here)
    (would,) = re.findall(r"^Would install (.*)$", output[-1], re.MULTILINE)
    names = {re.sub(r"-[^-]+$", "", word).lower() for word in would.split()}
    assert {"megatron-core", "transformers", "megatron-amopo", "wandb"} <= names
    assert system_torch.tied_to_torch(names) == []
    assert "pyyaml" not in names
    assert "megatron-core-0.19." in would
