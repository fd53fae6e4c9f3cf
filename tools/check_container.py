#!/usr/bin/env python3
"""Whether a container is what Dockerfile says, told without a GPU: the last step of its build.

Imports torch, Transformer Engine, apex, Megatron and this project, and shows where each comes from: the first three
have to be the image's, outside this environment. Then lets Megatron's parser read what the launch scripts pass on.

Exit codes: 0 all as it should be, 2 something isn't, with a line that says what.
"""

import argparse
import importlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_amopo.errors import AmopoError
from tools.command_line import exit_status

ROOT = Path(__file__).resolve().parent.parent
#: Module → name of its distribution.
FROM_THE_IMAGE = {"torch": "torch", "transformer_engine.pytorch": "transformer-engine", "apex": "apex"}
OURS = {"megatron.core": "megatron-core", "transformers": "transformers", "megatron_amopo": "megatron-amopo"}
SCRIPTS = ("qwen2.5_7b.sh", "qwen2.5_14b.sh", "qwen2.5_32b.sh")


class NotAsBuilt(AmopoError):
    """The container lacks something, or has it from elsewhere."""


def check_modules(names: dict[str, str], *, inside: bool) -> list[str]:
    """Import each module; a line with version and place of each.

    Args:
        names: module → distribution.
        inside: whether they are expected in this environment, not in the one that it was built on.

    Raises:
        NotAsBuilt: one can't be imported, or lies on the other side.
    """
    lines = []
    for module, distribution in names.items():
        try:
            found = importlib.import_module(module)
            version = importlib.metadata.version(distribution)
        except (ImportError, OSError, RuntimeError, AssertionError) as error:  # as Transformer Engine's loader has it
            raise NotAsBuilt(f"{module} can't be imported: {error}") from error
        place = Path(next(iter(found.__path__)))
        if (place.is_relative_to(sys.prefix) or place.is_relative_to(ROOT)) != inside:
            expected = "this environment" if inside else "the image"
            raise NotAsBuilt(f"{module} {version} comes from {place}, not from {expected}")
        lines.append(f"{distribution:20} {version:40} {place}")
    return lines


def training_flags(script: Path) -> list[str]:
    """What a launch script passes on to ``megatron_amopo.train``; nothing is started."""
    command = ["bash", str(script), "DATA", "MODEL", "OUTPUT"]
    shown = subprocess.run(command, env={**os.environ, "DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("torchrun ")]
    words = shlex.split(line)
    return words[words.index("megatron_amopo.train") + 1 :]


def check_flags() -> list[str]:
    """Let Megatron's parser read every launch script's flags; a line for each script.

    Raises:
        NotAsBuilt: it doesn't know one.
    """
    from megatron.training.arguments import add_megatron_arguments

    from megatron_amopo.training.arguments import add_amopo_arguments

    lines = []
    for script in SCRIPTS:
        parser = add_amopo_arguments(add_megatron_arguments(argparse.ArgumentParser(exit_on_error=False)))
        flags = training_flags(ROOT / "examples" / script)
        try:
            _, unknown = parser.parse_known_args(flags)
        except argparse.ArgumentError as error:
            raise NotAsBuilt(f"examples/{script}: {error}") from error
        if unknown:
            raise NotAsBuilt(f"examples/{script}: Megatron doesn't know {' '.join(unknown)}")
        lines.append(f"examples/{script}: {len(flags)} words of flags are known")
    return lines


def main() -> int:
    """Run; returns the exit status."""
    return exit_status(_check)


def _check() -> int:
    print(f"image: NVIDIA PyTorch {os.environ.get('NVIDIA_PYTORCH_VERSION', 'of unknown version')}")
    for line in check_modules(FROM_THE_IMAGE, inside=False) + check_modules(OURS, inside=True) + check_flags():
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
