"""Results that are finished while others aren't, kept beside the output so that a stopped run goes on where it was.

`OUTPUT.partial` is JSON lines: what was asked (a run that asks something else refuses the file), then one line for each
result, in any order. A line cut off by a kill doesn't count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_amopo.errors import ConfigError

_KEY = "id"


class Unfinished:
    """`found` maps the keys of what is finished to its fields, which are what JSON holds."""

    def __init__(self, output: Path, asked: Mapping[str, Any]) -> None:
        """Begin, or go on with what is there. Raises ConfigError where that was asked in another way."""
        self.path = output.with_name(f"{output.name}.partial")
        self.found: dict[str, dict[str, Any]] = {}
        head = json.dumps(asked, sort_keys=True)
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
            if lines and lines[0].endswith("\n") and lines[0] != head + "\n":
                raise ConfigError(
                    f"{self.path} holds what a run with other inputs or settings left: go on with the same ones, name "
                    "another --output, or remove the file"
                )
            whole = [line for line in lines[1:] if line.endswith("\n")]
            for line in whole:
                fields = json.loads(line)
                self.found[fields.pop(_KEY)] = fields
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.path} is damaged ({error!r}): remove it to begin anew") from error
        beside = self.path.with_name(f".{self.path.name}.new")
        beside.write_text("".join([head + "\n", *whole]), encoding="utf-8")
        os.replace(beside, self.path)

    def add(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep results, by their keys."""
        self.found.update({key: dict(fields) for key, fields in results.items()})
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({_KEY: key, **fields}) + "\n" for key, fields in results.items())

    def remove(self) -> None:
        """The output is there."""
        self.path.unlink()
