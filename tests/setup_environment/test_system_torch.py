"""`.venv` beside a torch that is there already: found, kept, pinned, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.machines import python_with_torch
from tests.support.requirements import requirements
from tools.setup_environment import common, pythons, system_torch


def test_the_current_environments_torch_is_found(env: dict[str, str], tmp_path: Path) -> None:
    # A pre-release, as in NVIDIA's images.
    python = python_with_torch(tmp_path / "an image", "2.11.0a0+1234abc.nv26.01")
    found = system_torch.find_system_torch({**env, "VIRTUAL_ENV": str(tmp_path / "an image")}, tmp_path / ".venv")
    assert found is not None
    assert found[0].path == str(python)
    assert found[0].is_virtual
    assert found[1].version == "2.11.0a0+1234abc.nv26.01"
    assert found[1].release == (2, 11)
    assert Path(found[1].file).parent.parent.name == "site-packages"


def test_no_torch_or_a_broken_one_is_no_system_torch(env: dict[str, str], tmp_path: Path) -> None:
    python = python_with_torch(tmp_path / "image", "2.11.0")
    next((tmp_path / "image").glob("lib/*/site-packages/torch/__init__.py")).write_text("import no_such_library\n")
    assert system_torch.find_system_torch({**env, "PATH": str(python.parent)}, tmp_path / ".venv") is None
    assert system_torch.find_system_torch(env, tmp_path / ".venv") is None


def test_a_torch_that_is_too_old_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    python = python_with_torch(tmp_path / "image", "2.10.0a0+1234abc.nv25.11")
    here = {**env, "PATH": str(python.parent)}
    with pytest.raises(common.SetupError, match=r"torch 2\.10\.0a0(?s:.*)AMOPO_SYSTEM_TORCH=no"):
        system_torch.find_system_torch(here, tmp_path / ".venv")
    assert system_torch.find_system_torch({**here, "AMOPO_SYSTEM_TORCH": "no"}, tmp_path / ".venv") is None


def test_what_is_tied_to_torch() -> None:
    names = ["torch", "torchvision", "pytorch-triton", "triton", "nvidia-cudnn-cu13", "transformer-engine-torch"]
    names += ["cuda-bindings", "flash-attn", "apex", "numpy", "cupy-cuda13x"]
    others = ["transformers", "pandas", "numpydoc", "apexcharts", "pytest", "tokenizers"]
    assert system_torch.tied_to_torch(names + others) == sorted(names)


def test_beside_an_images_torch_the_same_torch_is_imported_and_pinned(
    env: dict[str, str], checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but pip's work for real: `.venv` sees the image's packages and the constraints name them."""
    python_with_torch(tmp_path / "an image", "2.12.0", others=("triton", "pip"))
    pip_calls = []
    really = system_torch.run

    def run(command: list[str], *args: object) -> None:
        if "pip" in command:
            pip_calls.append(command)
        else:
            really(command, *args)

    monkeypatch.setattr(system_torch, "run", run)
    image = {**env, "VIRTUAL_ENV": str(tmp_path / "an image")}
    own = checkout / ".venv"
    found = system_torch.find_system_torch(image, own)
    assert found is not None
    system_torch.install_beside(*found, own, "dev", image)
    assert pythons.import_torch(own / "bin/python") == found[1]
    (call,) = pip_calls
    constraints = Path(call[call.index("--constraint") + 1])
    assert constraints.read_text().split() == ["torch==2.12.0", "triton==2.12.0"]

    inside = next(own.glob("lib/python3*/site-packages"))
    (inside / "triton-9.0.dist-info").mkdir()
    with pytest.raises(common.SetupError, match="belongs to the image's torch: triton"):
        system_torch.check_untouched(found[1], ["torch", "triton"], own)
    (inside / "torch").mkdir()
    (inside / "torch/__init__.py").write_text("__version__ = '9.0'\n")
    with pytest.raises(common.SetupError, match=r"not the torch 2\.12\.0"):
        system_torch.check_untouched(found[1], ["torch", "triton"], own)


def test_the_lowest_torch_is_the_one_setup_py_states() -> None:
    (stated,) = [line for line in requirements() if line.startswith("torch")]
    major, minor = system_torch.lowest_torch()
    assert f">={major}.{minor}." in stated
