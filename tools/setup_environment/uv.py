"""uv, the installer: found or fetched, and told where packages come from.

uv does not read pip's configuration, yet someone whose company has a mirror has usually told pip about it, and only
pip: its settings are handed on where uv has none of its own. No index address is ever printed: it may hold a password.
"""

from __future__ import annotations

import configparser
import hashlib
import html
import io
import os
import platform
import re
import subprocess
import sys
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path

from .common import answer
from .pythons import home_of, on_path

OLDEST = (0, 5)  # the variables below have these names since 0.4.23
# pip's option -> uv's variable, and what separates several values in it (None: one value, which may hold spaces)
_PIP_TO_UV = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "timeout": ("UV_HTTP_TIMEOUT", None),
    "cert": ("SSL_CERT_FILE", None),
    "client-cert": ("SSL_CLIENT_CERT", None),
    "proxy": ("ALL_PROXY", None),
}
_UV_SOURCES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX")
_PUBLIC_INDEX = "https://pypi.org/simple"  # pip's and uv's own default; used here only where there is neither


def pip_settings(env: Mapping[str, str]) -> dict[str, str]:
    """pip's options as its configuration files and PIP_* variables set them, later ones winning as in pip."""
    home = home_of(env)
    user = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), home / ".pip/pip.conf", user / "pip/pip.conf"]
    if env.get("PIP_CONFIG_FILE") == os.devnull:
        files = []  # pip's way of saying: no configuration files
    elif env.get("PIP_CONFIG_FILE"):
        files.append(Path(env["PIP_CONFIG_FILE"]))
    settings: dict[str, str] = {}
    for section in ("global", "install"):
        for file in files:
            parser = configparser.RawConfigParser()
            try:
                parser.read(file, encoding="utf-8")
            except (configparser.Error, OSError, UnicodeDecodeError):
                continue  # pip complains about such a file itself
            if parser.has_section(section):
                settings.update({option.replace("_", "-"): value for option, value in parser.items(section)})
    for name, value in env.items():
        if name.startswith("PIP_") and value:
            settings[name[len("PIP_") :].lower().replace("_", "-")] = value
    return settings


def uv_environment(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """`env` for running uv, with pip's settings where uv has no sources of its own; and the names of these."""
    merged = dict(env)
    user = Path(env.get("XDG_CONFIG_HOME") or home_of(env) / ".config")
    own = [user / "uv/uv.toml", Path("/etc/uv/uv.toml")]
    if env.get("UV_CONFIG_FILE") or any(env.get(name) for name in _UV_SOURCES) or any(file.is_file() for file in own):
        return merged, []
    settings = pip_settings(env)
    no_index = settings.get("no-index", "no").lower() not in ("0", "false", "no", "off")
    if no_index:
        # uv's UV_NO_INDEX does not reach builds (0.13): an index without packages does
        settings = {**settings, "index-url": "file:///nonexistent", "extra-index-url": ""}
    handed_on = []
    for option, value in settings.items():
        variable, separator = _PIP_TO_UV.get(option, ("", None))
        if variable and value and not merged.get(variable):
            merged[variable] = value if separator is None else separator.join(value.split())
            handed_on.append("no-index" if no_index and option == "index-url" else option)
    if "extra-index-url" in handed_on:
        # pip takes the best version that any index has; uv would stop at the first index that knows the package
        merged.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return merged, handed_on


def find_uv(env: Mapping[str, str], fetched: Path) -> str | None:
    """A uv that runs and is not too old: on PATH, in its usual places, or the one that was fetched into `fetched`."""
    home = home_of(env)
    for path in (*on_path("uv", env), home / ".local/bin/uv", home / ".cargo/bin/uv", fetched / "bin/uv"):
        found = re.match(r"uv (\d+)\.(\d+)", answer([str(path), "--version"]) or "")
        if found and (int(found[1]), int(found[2])) >= OLDEST:
            return str(path)
    return None


def fetch_uv(env: Mapping[str, str], folder: Path) -> str | None:
    """Fetch uv into `folder` and return its path: with this Python's pip, else from the index; None: no way."""
    # A person's pip.conf may say `user` or `require-virtualenv`, which don't go with --target.
    calm = {**env, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    wanted = f"uv>={OLDEST[0]}.{OLDEST[1]}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder), wanted]
    if subprocess.run(command, env=calm, stdin=subprocess.DEVNULL, capture_output=True).returncode != 0:
        try:
            _unpack_uv(env, folder)
        except (OSError, ValueError, LookupError, zipfile.BadZipFile):
            return None
    return find_uv({}, folder)


def _unpack_uv(env: Mapping[str, str], folder: Path) -> None:
    """Take uv's newest wheel for this machine from the package index, check its hash and unpack its program.

    For a Python without pip, which is how Debian and Ubuntu install it.
    """
    index = (
        env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL") or pip_settings(env).get("index-url") or _PUBLIC_INDEX
    )
    page = index.rstrip("/") + "/uv/"
    with urllib.request.urlopen(page, timeout=60) as response:
        links = [html.unescape(link) for link in re.findall(r'href="([^"]+)"', response.read().decode())]
    wheel = rf"/uv-(\d+)\.(\d+)\.(\d+)-py3-none-manylinux[^/]*_{platform.machine()}[^/]*\.whl#sha256=([0-9a-f]{{64}})$"
    found = [match for match in (re.search(wheel, link) for link in links) if match]
    newest = max(found, key=lambda match: [int(part) for part in match.groups()[:3]])
    with urllib.request.urlopen(urllib.parse.urljoin(page, newest.string), timeout=600) as response:
        content = response.read()
    if hashlib.sha256(content).hexdigest() != newest[4]:
        raise ValueError("the wheel's hash is not the index's")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        program = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin/uv").write_bytes(archive.read(program))
    (folder / "bin/uv").chmod(0o755)
