"""Reading a run's files and writing the report's: every error says which file it is about."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_amopo.errors import AmopoError
from megatron_amopo.files import write_whole


class ReportError(AmopoError):
    """A folder that can't be reported on, or a report that can't be written."""


def read_json_object(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None where there is no file.

    Raises:
        ReportError: it can't be read, or holds something else.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: can't be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path}: holds no JSON object")
    return content


@dataclass(frozen=True)
class JsonLines:
    """The objects of a file of JSON lines; ``cut_off`` says that half a line follows them."""

    objects: tuple[dict[str, Any], ...]
    cut_off: bool


def read_json_lines(path: Path) -> JsonLines:
    """Read a file of JSON lines; none where there is no file. A last line that is being written, or that a kill cut
    off, is left out.

    Raises:
        ReportError: it can't be read, or a line before the last is no JSON object.
    """
    if not path.is_file():
        return JsonLines((), cut_off=False)
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: can't be read ({error})") from error
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return JsonLines(tuple(objects), cut_off=bool(line))
            raise ReportError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ReportError(f"{path}, line {number}: not a JSON object")
        objects.append(content)
    return JsonLines(tuple(objects), cut_off=False)


def read_text(path: Path) -> str:
    """A file's text; bytes that are none are replaced.

    Raises:
        ReportError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"{path}: can't be read ({error.strerror})") from error


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it.

    Raises:
        ReportError: it can't be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise ReportError(f"{path}: can't be written ({error.strerror})") from error
