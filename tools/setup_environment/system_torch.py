"""`.venv` on top of an environment that already has torch, as NVIDIA's containers do: add, replace nothing.

The image's torch is built for its CUDA, its Transformer Engine against that torch, and so on. So `.venv` sees that
environment's packages; torch and all that is tied to it are held at the installed versions by pip's constraints; and
afterwards it is checked that `.venv` imports the very torch that was there before. pip installs, because uv does not
look at packages outside the virtual environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .common import NETWORK_HINT, ROOT, SetupError, answer, dotted, install_stages, run, say
from .pythons import (
    MINIMUM,
    Python,
    Torch,
    asked_python,
    current_pythons,
    import_torch,
    normalised,
    packages_of,
    probe,
)

# Compiled against torch or CUDA, or the other way round: beside the image's torch, another version of any of these is a
# large download at best and a crash at worst.
_TIED = re.compile(r"torch.*|pytorch-.*|triton.*|nvidia-.*|cuda-.*|cupy.*|transformer-engine.*|flash-attn.*|apex|numpy")
_PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"


def tied_to_torch(names: Iterable[str]) -> list[str]:
    """Those of the packages that must stay as they are beside an image's torch, sorted."""
    return sorted(name for name in names if _TIED.fullmatch(name))


def find_system_torch(env: Mapping[str, str], own_venv: Path) -> tuple[Python, Torch] | None:
    """The current environment's Python and torch, None if it has none; SetupError if that torch is too old for us."""
    if env.get("AMOPO_SYSTEM_TORCH", "").lower() in ("no", "0", "false", "off"):
        return None
    asked = asked_python(env)
    for python in [asked] if asked else current_pythons(env, own_venv):
        if not python.has_torch:
            continue
        if python.version[:2] < MINIMUM:
            say(f"{python} has torch but is older than {dotted(MINIMUM)}: not used")
            continue
        torch = import_torch(python.path)
        if torch is None:
            say(f"{python} has a torch that cannot be imported: not used")
            continue
        needed = lowest_torch()
        if torch.release < needed:
            raise SetupError(
                f"{python} has torch {torch.version}; this project needs {dotted(needed)} or newer.\n"
                "  Nothing was changed. Use a newer image or environment, or let .venv have a torch of its own:\n"
                "    make setup AMOPO_SYSTEM_TORCH=no"
            )
        return python, torch
    return None


def lowest_torch(root: Path = ROOT) -> tuple[int, int]:
    """The lowest torch that setup.py accepts."""
    found = re.search(r'"torch>=(\d+)\.(\d+)', (root / "setup.py").read_text(encoding="utf-8"))
    if found is None:
        raise SetupError("setup.py states no lowest torch")
    return int(found[1]), int(found[2])


def install_beside(python: Python, torch: Torch, venv: Path, extras: str, env: Mapping[str, str]) -> None:
    """Make `.venv` on top of `python`'s environment and add what is missing; SetupError if torch would not stay."""
    places, packages = packages_of(python.path)
    pinned = tied_to_torch(packages)
    say(f"this environment has torch {torch.version} ({torch.file})")
    say(f"it is kept as it is, and so are {', '.join(name for name in pinned if name != 'torch') or 'no others'}")
    say(f"{python} -> {venv}, which sees that environment's packages")
    make = [python.path, "-m", "venv", "--system-site-packages"]
    if "pip" in packages:
        make.append("--without-pip")  # that environment's pip is seen, and an image may lack ensurepip
    run([*make, str(venv)], env, f"{python} could not create {venv}")
    inside = str(venv / "bin/python")
    if python.is_virtual:
        # --system-site-packages shows the packages of the Python below a virtual environment, not the environment's own
        own = [place for place in places if Path(python.prefix) in Path(place).parents]
        lines = "".join(f"import site; site.addsitedir({place!r})\n" for place in own)
        (_package_folder(venv) / "_environment_with_torch.pth").write_text(lines, encoding="utf-8")
    constraints = venv / "constraints.txt"
    constraints.write_text("".join(f"{name}=={packages[name]}\n" for name in pinned), encoding="utf-8")
    say(f"pip installs the project with [{extras}] and what is missing")
    pip = [inside, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    for stage in install_stages(extras):
        run(
            [*pip, *stage],
            {**env, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            "pip could not install what is missing; its message is above. Torch and what is tied to it are unchanged.\n"
            f"  If pip names one of them: they are held at the versions in {constraints};\n"
            "  use another image, or AMOPO_SYSTEM_TORCH=no to give .venv a torch of its own.\n" + NETWORK_HINT,
        )
    check_untouched(torch, pinned, venv)


def check_untouched(torch: Torch, pinned: Iterable[str], venv: Path) -> None:
    """SetupError unless `.venv` imports that very torch and itself holds nothing tied to it; says what it holds."""
    now = import_torch(venv / "bin/python")
    if now != torch:
        raise SetupError(f".venv imports {now}, not the torch {torch.version} of {torch.file}")
    entries = [entry.name[: -len(".dist-info")] for entry in sorted(_package_folder(venv).glob("*.dist-info"))]
    held = {normalised(name): version for name, _, version in (entry.partition("-") for entry in entries)}
    replaced = [name for name in tied_to_torch(held) if name in pinned or name != "numpy"]
    if replaced:
        raise SetupError(f".venv holds what belongs to the image's torch: {', '.join(replaced)}")
    say("added: " + ", ".join(f"{name} {version}" for name, version in held.items()))


def _package_folder(venv: Path) -> Path:
    folder = answer([str(venv / "bin/python"), "-c", _PURELIB])
    if folder is None or probe(venv / "bin/python") is None:
        raise SetupError(f"the Python in {venv} does not run")
    return Path(folder)
