"""Reading input files record by record, whatever their size: JSONL, a JSON list, either of them gzipped, or Parquet.

Takes a path; gives `RawItem`s that are cut out but not yet parsed, so that parsing runs in the worker processes and a
broken record is one record's problem. A JSON list is cut at its top-level commas by scanning for strings and
brackets, in bounded memory.
"""

import gzip
import io
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_amopo.errors import DataError

_CHUNK = 1 << 20
#: No record is larger. It bounds memory when a file has no line ends, or a quote that never closes.
MAX_RECORD_BYTES = 64 << 20
# A whole string, or a quote whose string hasn't ended yet, or a mark of structure.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|["\[\]{},]', re.DOTALL)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RawItem:
    """One record as found. `source` is 'file:line' in JSONL (from 1) and 'file[row]' in lists and Parquet (from 0);
    `raw` are its bytes, or the row of a Parquet file; `position` is how far into the file, in bytes on disk, its end
    is.
    """

    source: str
    raw: bytes | dict[str, Any]
    position: int


def check_input(path: Path) -> int:
    """Size in bytes of an input file. Raises DataError naming the file where it is missing, a folder, unreadable or
    empty.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the files in it")
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    if size == 0:
        raise DataError(f"{path}: the file is empty")
    return size


def labels(paths: Sequence[Path]) -> list[str]:
    """How messages call each file: by its name, or by its path as given where two have the same name."""
    names = [path.name for path in paths]
    return [path.name if names.count(path.name) == 1 else str(path) for path in paths]


def read_items(path: Path, label: str) -> Generator[RawItem]:
    """All records of a file in order. Raises DataError where the file as a whole can't be read."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, label)
            return
        with path.open("rb") as disk:
            compressed = disk.read(2) == b"\x1f\x8b"
            disk.seek(0)
            stream: BinaryIO = gzip.GzipFile(fileobj=disk) if compressed else disk  # type: ignore[assignment]
            head = stream.read(_CHUNK)
            head = head.removeprefix(_BOM)
            if head.lstrip()[:1] == b"[":
                yield from _json_list(stream, head, disk, label)
            else:
                yield from _json_lines(stream, head, disk, label)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read to its end ({error})") from error


def _json_lines(stream: BinaryIO, head: bytes, disk: BinaryIO, label: str) -> Iterator[RawItem]:
    number = 0
    rest = head
    while True:
        lines = rest.split(b"\n")
        rest = lines.pop()
        position = disk.tell()
        for line in lines:
            number += 1
            if line.strip():
                yield RawItem(f"{label}:{number}", line, position)
        if len(rest) > MAX_RECORD_BYTES:
            raise DataError(
                f"{label}:{number + 1}: a line of more than {MAX_RECORD_BYTES >> 20} MiB; is this a JSONL file?"
            )
        more = stream.read(_CHUNK)
        if not more:
            break
        rest += more
    if rest.strip():
        yield RawItem(f"{label}:{number + 1}", rest, disk.tell())


def _json_list(stream: BinaryIO, head: bytes, disk: BinaryIO, label: str) -> Iterator[RawItem]:
    """Elements of `[a, b, …]`. A list that breaks off gives its unfinished element, too, which then fails to parse."""
    buffer = head[head.index(b"[") + 1 :]
    number = depth = start = scan = 0
    while True:
        unfinished = False
        for match in _TOKEN.finditer(buffer, scan):
            token = match[0]
            if token == b'"':
                scan, unfinished = match.start(), True
                break
            scan = match.end()
            if token in b"[{":
                depth += 1
            elif token in b"]}" and depth > 0:
                depth -= 1
            elif token in b",]" and depth == 0:
                if buffer[start : match.start()].strip():
                    yield RawItem(f"{label}[{number}]", buffer[start : match.start()], disk.tell())
                    number += 1
                if token == b"]":
                    return
                start = match.end()
        if not unfinished:
            scan = len(buffer)
        buffer, scan, start = buffer[start:], scan - start, 0
        if len(buffer) > MAX_RECORD_BYTES:
            raise DataError(
                f"{label}[{number}]: an element of over {MAX_RECORD_BYTES >> 20} MiB; is a quote or bracket missing?"
            )
        more = stream.read(_CHUNK)
        if not more:
            break
        buffer += more
    if buffer.strip():
        yield RawItem(f"{label}[{number}]", buffer, disk.tell())


def _parquet(path: Path, label: str) -> Iterator[RawItem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = path.stat().st_size
    number = 0
    try:
        file = pq.ParquetFile(path)
        rows = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield RawItem(f"{label}[{number}]", row, size * (number + 1) // rows)
                number += 1
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
