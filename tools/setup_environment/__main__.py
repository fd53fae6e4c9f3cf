"""The order of the steps of `make setup`, and the stamp that lets the next run skip them.

Two ways, chosen by what is there:

- usually a Python 3.12 or 3.13 is found, or fetched by uv; uv makes `.venv` and installs the project into it;
- the current environment already has torch: see system_torch.py.

Nothing outside the checkout changes but the caches of uv and pip. The stamp, `.venv/setup.json`, is written last and
says what the environment was made for; without it, or when it no longer fits, `.venv` is made anew.

Environment variables (also as `make setup NAME=value`):
  PYTHON              the Python to build on, 3.12 or newer
  AMOPO_EXTRAS        extras of setup.py to install; default dev,plots
  AMOPO_TORCH_INDEX   index to take torch from; https://download.pytorch.org/whl/cpu has the small build without CUDA
  AMOPO_SYSTEM_TORCH  "no": leave the current environment's torch alone and install another into .venv
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .common import NETWORK_HINT, ROOT, SetupError, answer, dotted, install_stages, run, say
from .pythons import MINIMUM, Python, asked_python, candidates, find_python, packages_of, probe
from .system_torch import find_system_torch, install_beside
from .uv import fetch_uv, find_uv, uv_environment

VARIABLES = ("PYTHON", "AMOPO_EXTRAS", "AMOPO_TORCH_INDEX", "AMOPO_SYSTEM_TORCH")
DEFAULT_EXTRAS = "dev,plots"
STAMP = "setup.json"
_TORCH_FILE = "import importlib.util; print(importlib.util.find_spec('torch').origin)"


@dataclass(frozen=True)
class Stamp:
    """What a complete `.venv` was made for and from."""

    dependencies: str  # hash of the files that state them
    checkout: str  # an editable installation points there
    asked: dict[str, str]  # VARIABLES that the person had set
    python: str  # version
    torch_file: str


def hash_of_dependencies(root: Path) -> str:
    """Hash of the files that say what is installed."""
    digest = hashlib.sha256()
    for name in ("setup.py", "pyproject.toml"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> Stamp | None:
    """The stamp of `.venv`, None without a readable one."""
    try:
        return Stamp(**json.loads((venv / STAMP).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(root: Path, venv: Path, asked: dict[str, str]) -> None:
    """Say that `.venv` is complete; SetupError if it is not."""
    inside = str(venv / "bin/python")
    python, torch_file = probe(inside), answer([inside, "-c", _TORCH_FILE])
    if python is None or torch_file is None:
        raise SetupError(f"{venv} was installed, but its Python has no torch")
    stamp = Stamp(hash_of_dependencies(root), str(root), asked, dotted(python.version), torch_file)
    part = venv / f"{STAMP}.part"
    part.write_text(json.dumps(asdict(stamp), indent=1), encoding="utf-8")
    part.replace(venv / STAMP)


def is_complete(stamp: Stamp | None, root: Path, venv: Path, env: Mapping[str, str]) -> bool:
    """Whether `.venv` is what is asked for now, its Python still runs, and torch is still where it was.

    A variable that is not set now asks for nothing: `make setup PYTHON=…` once, and `make test` keeps to it.
    """
    if stamp is None or stamp.checkout != str(root) or stamp.dependencies != hash_of_dependencies(root):
        return False
    if any(env[name] != stamp.asked.get(name, "") for name in VARIABLES if name in env):
        return False
    python = probe(venv / "bin/python")
    return python is not None and dotted(python.version) == stamp.python and Path(stamp.torch_file).is_file()


def remove_old(venv: Path, building: Path) -> None:
    """Remove a `.venv` of ours, complete or not; SetupError if there is one that somebody else made."""
    if not venv.exists() and not venv.is_symlink():
        return
    if not (venv / STAMP).exists() and not building.exists():
        raise SetupError(f"{venv} was not made by `make setup`: move it away, or remove it with `make clean`")
    say(f"{venv} is incomplete or for something else: made anew")
    if venv.is_symlink():
        venv.unlink()
    else:
        shutil.rmtree(venv)


def choose_python(env: Mapping[str, str], uv: str | None, venv: Path, fetched: Path) -> Python:
    """PYTHON if set, else the first suitable one on the machine, else one that uv fetches into `fetched`."""
    asked = asked_python(env)
    if asked is not None:
        return asked
    python, passed_over = find_python(candidates(env, venv, fetched))
    for reason in passed_over:
        say(f"passed over: {reason}")
    if python is not None:
        return python
    advice = (
        "  Install Python 3.12 (a package python3.12, `pyenv install 3.12`, `conda create -n py312 python=3.12`),\n"
        "  then: make setup PYTHON=/path/to/python3.12. A mirror for uv's Pythons: UV_PYTHON_INSTALL_MIRROR.\n"
        + NETWORK_HINT
    )
    nowhere = "there is no Python 3.12 or 3.13 on PATH, in pyenv, conda, asdf, mise or uv"
    if uv is None:
        raise SetupError(f"{nowhere}, and uv could not be fetched to bring one.\n{advice}")
    say(f"{nowhere}: uv fetches one into {fetched}")
    uv_env, _ = uv_environment(env)
    uv_env["UV_PYTHON_INSTALL_DIR"] = str(fetched)
    uv_env["UV_PYTHON_INSTALL_BIN"] = "0"  # no link to it in ~/.local/bin
    run(
        [uv, "python", "install", dotted(MINIMUM)],
        uv_env,
        f"uv could not fetch a Python; its message is above.\n{advice}",
    )
    python, _ = find_python(candidates(env, venv, fetched))
    if python is None:
        raise SetupError(f"the Python that uv fetched into {fetched} does not run here.\n{advice}")
    return python


def install_fresh(env: Mapping[str, str], venv: Path, tools: Path, extras: str) -> None:
    """Make `.venv` from a Python of its own and install everything, with uv, or with pip where uv cannot be had."""
    uv = find_uv(env, tools / "uv")
    if uv is None:
        say(f"uv is not there: fetching it into {tools / 'uv'}")
        uv = fetch_uv(env, tools / "uv")
    python = choose_python(env, uv, venv, tools / "python")
    say(f"{python} -> {venv}")
    inside = str(venv / "bin/python")
    no_venv = f"{venv} could not be created with {python}; the message is above.\n{NETWORK_HINT}"
    if uv is not None:
        install_env, handed_on = uv_environment(env)
        say(f"installer: {answer([uv, '--version'])}" + (f", with pip's {', '.join(handed_on)}" if handed_on else ""))
        run([uv, "venv", "--quiet", "--python", python.path, str(venv)], install_env, no_venv)
        install = [uv, "pip", "install", "--python", inside]
    else:
        install_env = {**env, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        say("installer: pip (uv could not be fetched)")
        run([python.path, "-m", "venv", str(venv)], env, no_venv)
        install = [inside, "-m", "pip", "install"]
    failed = f"installing failed; the installer's message is above.\n{NETWORK_HINT}"
    if env.get("AMOPO_TORCH_INDEX"):
        say("torch comes from AMOPO_TORCH_INDEX")
        # Alone, so that this index serves nothing else; the installed torch then satisfies the project's requirement.
        only = {name: value for name, value in install_env.items() if not name.endswith(("_INDEX", "_INDEX_URL"))}
        run([*install, "--no-deps", "--index-url", env["AMOPO_TORCH_INDEX"], "torch"], only, failed)
    else:
        say("torch for Linux comes with its CUDA libraries, some 5 GB; AMOPO_TORCH_INDEX picks another build")
    say(f"installing the project with [{extras}]")
    # pip, too: uv makes environments without it, and people type `pip install`
    for stage in install_stages(extras):
        run([*install, "pip", *stage], install_env, failed)


def set_up(env: Mapping[str, str], root: Path = ROOT) -> None:
    """Make `root/.venv`, or find it complete."""
    started = time.monotonic()
    venv, tools = root / ".venv", root / ".venv-tools"
    building = tools / "building"  # there while `.venv` is ours but has no stamp yet
    tools.mkdir(exist_ok=True)
    with open(tools / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `make test` and `make demo` may be started side by side
        stamp = read_stamp(venv)
        if is_complete(stamp, root, venv, env):
            say(f"{venv} is up to date")
            return
        asked = {**(stamp.asked if stamp else {}), **{name: env[name] for name in VARIABLES if name in env}}
        env = {**env, **asked}
        extras = env.get("AMOPO_EXTRAS") or DEFAULT_EXTRAS
        system = find_system_torch(env, venv)
        remove_old(venv, building)
        building.touch()
        try:
            if system is not None:
                install_beside(*system, venv, extras, env)
            else:
                install_fresh(env, venv, tools, extras)
        finally:
            if not venv.exists():
                building.unlink()  # a `.venv` that appears later is not ours
        _, packages = packages_of(venv / "bin/python")
        names = ("torch", "megatron-core", "transformers", "transformer-engine")
        versions = ", ".join(f"{name} {packages[name]}" for name in names if name in packages)
        write_stamp(root, venv, asked)
        building.unlink()
    say(f"{versions}; {len(packages)} packages in all")
    say(f"{venv} is ready after {time.monotonic() - started:.0f} s (`make clean` removes it)")


def main() -> int:
    try:
        set_up(os.environ)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nerror: interrupted; the next run starts over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
