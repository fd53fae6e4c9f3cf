"""A process that wants a cache's entry, for tests/checkpoint/test_import_cache.py: `python importers.py JSON`.

It imports neither torch nor Megatron, so that many can be started. Its conversion copies config.json, leaves a line in
a log, and does what the test asks on the way: wait for a file, fail, or never end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from megatron_amopo.checkpoint.import_cache import TRACKER, import_once
from megatron_amopo.errors import AmopoError, CheckpointError


def main() -> int:
    asked = json.loads(sys.argv[1])
    log = Path(asked["log"])

    def convert(source: Path, target: Path) -> None:
        with log.open("a") as file:
            file.write(f"{source.name}\n")
        (target.parent / "half").write_text("of a checkpoint")
        while asked.get("until") and not Path(asked["until"]).exists():
            time.sleep(0.01)
        if asked.get("fail"):
            raise CheckpointError(f"{source}: a shard is damaged")
        target.mkdir()
        (target / "config.json").write_bytes((source / "config.json").read_bytes())
        (target / TRACKER).write_text("release")

    try:
        print(import_once(Path(asked["source"]), Path(asked["cache"]), convert))
    except AmopoError as error:
        print(f"{type(error).__name__}: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
