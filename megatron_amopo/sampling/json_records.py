"""Records of a JSON file, as a list or one a line, read strictly: what is taken here can be written as JSON again.

Python's reader takes NaN, halves of surrogate pairs and any nesting; all of them would fail much later, in a tokenizer
or when answers are written. Takes a path; gives each record with where it stands, as messages say it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_amopo.errors import DataError


def read_text(path: Path) -> str:
    """A file's text, a byte order mark left out. Raises DataError naming the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text: {error}") from error


def json_records(path: Path, text: str) -> list[tuple[str, Any]]:
    """The records of a file's text with their places, 'record 3' of a list or 'line 3'. Raises DataError naming the
    file and the place.
    """
    if text.lstrip().startswith("["):
        records = [(f"record {number}", record) for number, record in enumerate(_parse(str(path), text), 1)]
        for where, record in records:
            _check(f"{path}, {where}", record)
        return records
    records = []
    # Not splitlines, which cuts at characters that JSON may hold, U+2028 for one.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number}"
            records.append((where, _parse(f"{path}, {where}", line)))
            _check(f"{path}, {where}", records[-1][1])
    return records


def _parse(named: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{named}: not valid JSON ({error})") from error


def _check(named: str, record: Any) -> None:
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{named}: holds half of a surrogate pair, which no encoding can hold") from error
    except (ValueError, RecursionError) as error:  # NaN and infinity; too deep to be written
        raise DataError(f"{named}: not valid JSON ({error})") from error
