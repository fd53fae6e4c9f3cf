"""What the steps of set-up share: lines for the person watching, the error that ends set-up, and running commands."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NETWORK_HINT = (
    "  No network, or only a mirror? Tell pip or uv where packages are (PIP_INDEX_URL, UV_DEFAULT_INDEX, pip.conf,\n"
    "  uv.toml; for a proxy HTTPS_PROXY), or carry over a folder of wheels: docs/install.md says how.\n"
    "  Then run the same command again."
)


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


def say(text: str) -> None:
    """One line for the person watching, at once even when output goes to a file."""
    print(f"setup: {text}", flush=True)


def dotted(version: Sequence[int]) -> str:
    """(3, 12) -> 3.12"""
    return ".".join(map(str, version))


def run(command: Sequence[str], env: Mapping[str, str], failure: str) -> None:
    """Run in the checkout with output to the terminal; SetupError(failure) when it does not end well."""
    try:
        code = subprocess.run(command, cwd=ROOT, env=dict(env), stdin=subprocess.DEVNULL).returncode
    except OSError as error:
        raise SetupError(f"{failure}\n  {error}") from error
    if code != 0:
        raise SetupError(failure)


def install_stages(extras: str) -> list[list[str]]:
    """Arguments of the installer's calls, in order.

    Transformer Engine's torch part is compiled. In isolation, as usual, it would be against a torch fetched for the
    purpose, and not against the one that loads it: torch and the build tools come first, then it without isolation.
    """
    names = extras.split(",")
    if "gpu" not in names:
        return [["--editable", f".[{extras}]"]]
    rest = ",".join(name for name in names if name != "gpu")
    return [
        [*_BUILD_TOOLS, "--editable", f".[{rest}]" if rest else "."],
        ["--no-build-isolation", "--editable", f".[{extras}]"],
    ]


_BUILD_TOOLS = ("setuptools>=77", "wheel", "packaging", "pybind11", "ninja")


def answer(command: Sequence[str], timeout: float = 60) -> str | None:
    """Last line that a command prints, or None if it cannot be run, fails, hangs or prints nothing."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=True
        )
        return done.stdout.strip().splitlines()[-1]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
