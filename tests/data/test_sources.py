"""Cutting files into records: every container gives the same records, whatever the chunk size."""

import gzip
import json
import random

import pytest

from megatron_amopo.data import sources
from megatron_amopo.data.formats import parse_json
from megatron_amopo.data.sources import check_input, labels, read_items
from megatron_amopo.errors import DataError

RECORDS = [
    {"text": 'a "quoted" ] [ } { \\ , line\n', "n": [1, {"m": []}]},
    {"text": "ü 漢字"},
    {"empty": {}},
    {"k": "v" * 50},
]


def parsed(path):
    return [parse_json(item.raw) for item in read_items(path, path.name)]


@pytest.fixture(params=[1, 2, 3, 7, 64, 1 << 20])
def chunk_size(request, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk_size")
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_json_list(tmp_path, indent, ascii_only):
    path = tmp_path / "list.json"
    path.write_text("\n " + json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only) + "\n")
    if sources._CHUNK < 3:
        path.write_text(path.read_text().lstrip())  # the format is told from the first chunk
    assert parsed(path) == RECORDS
    assert [item.source for item in read_items(path, "list.json")] == [f"list.json[{i}]" for i in range(4)]


@pytest.mark.usefixtures("chunk_size")
def test_json_lines_with_blank_lines_and_no_last_end(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [json.dumps(record) for record in RECORDS]
    path.write_bytes(f"{lines[0]}\r\n\n{lines[1]}\n  \n{lines[2]}\n{lines[3]}".encode())
    assert parsed(path) == RECORDS
    assert [item.source for item in read_items(path, "f")] == ["f:1", "f:3", "f:5", "f:6"]


def test_random_lists_agree_with_the_json_module(tmp_path, monkeypatch):
    rng = random.Random(0)

    def value(depth):
        kind = rng.randrange(6 if depth < 3 else 3)
        if kind == 0:
            return rng.choice([1, -2.5, None, True])
        if kind < 3:
            return "".join(rng.choice('ab"\\[]{},:\n é') for _ in range(rng.randrange(12)))
        if kind == 3:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        return {f"k{i}": value(depth + 1) for i in range(rng.randrange(4))}

    monkeypatch.setattr(sources, "_CHUNK", 5)
    path = tmp_path / "random.json"
    for _ in range(200):
        elements = [{"v": value(0)} for _ in range(rng.randrange(1, 5))]
        path.write_text(json.dumps(elements, ensure_ascii=rng.random() < 0.5))
        assert parsed(path) == elements


def test_byte_order_mark_and_gzip(tmp_path):
    path = tmp_path / "lines.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + b"\n".join(json.dumps(r).encode() for r in RECORDS)))
    assert parsed(path) == RECORDS


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"a": i, "b": {"c": str(i)}} for i in range(600)]), path)
    items = list(read_items(path, "rows"))
    assert [item.raw for item in items] == [{"a": i, "b": {"c": str(i)}} for i in range(600)]
    assert items[599].source == "rows[599]"
    assert items[599].position == path.stat().st_size


def test_positions_grow_to_the_size(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("{}\n" * 10)
    positions = [item.position for item in read_items(path, "f")]
    assert positions == sorted(positions)
    assert positions[-1] == check_input(path) == 30


def test_an_unfinished_list_gives_its_last_element(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('[{"a": 1}, {"b": "x')
    raws = [item.raw for item in read_items(path, "f")]
    assert raws == [b'{"a": 1}', b' {"b": "x']


def test_a_record_without_end_is_an_error_and_not_a_full_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(sources, "_CHUNK", 100)
    path = tmp_path / "data"
    path.write_text('[{"a": "' + "x" * 2000)
    with pytest.raises(DataError, match=r"f\[0\]: an element of over"):
        list(read_items(path, "f"))
    path.write_text("{}\n" + "x" * 2000)
    with pytest.raises(DataError, match=r"f:2: a line of more than"):
        list(read_items(path, "f"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.parquet", b"not parquet"), ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 100, mtime=0)[:-20])],
)
def test_broken_containers(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=name):
        list(read_items(path, "f"))


def test_unusable_files(tmp_path):
    (tmp_path / "empty").touch()
    for path, says in [
        (tmp_path, "is a folder"),
        (tmp_path / "none", "can't be read"),
        (tmp_path / "empty", "is empty"),
    ]:
        with pytest.raises(DataError, match=says) as error:
            check_input(path)
        assert str(path) in str(error.value)


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "y"]
    assert labels(paths) == [str(paths[0]), str(paths[1]), "y"]
