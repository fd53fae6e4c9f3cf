"""The cache of imported models: its entries' names, and one import however many processes ask, die or fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_amopo.checkpoint import import_cache
from megatron_amopo.checkpoint.import_cache import TRACKER, ImportFailed, cache_folder, entry_name, import_once
from megatron_amopo.checkpoint.megatron import TRACKER as MEGATRON_TRACKER
from megatron_amopo.errors import CheckpointError, ConfigError
from tests.support import importers

SECONDS = 60  # no process takes as long
HEADER = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a Hugging Face folder looks like from outside."""
    folder = tmp_path / "Tiny 0.5B"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 7}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + b"1234")
    return folder


@pytest.fixture
def start(tmp_path: Path, source: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(until=…, fail=…) starts a process that wants the entry; see tests/support/importers.py."""
    started: list[subprocess.Popen[str]] = []

    def begin(**asked: object) -> subprocess.Popen[str]:
        asked = {"source": str(source), "cache": str(tmp_path / "cache"), "log": str(tmp_path / "log"), **asked}
        command = [sys.executable, str(importers.__file__), json.dumps(asked)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def imports(tmp_path: Path) -> int:
    """How many conversions have begun."""
    return len((tmp_path / "log").read_text().splitlines()) if (tmp_path / "log").exists() else 0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until_it_waits(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("> waiting until process"), line
    return line


def result(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=SECONDS)
    return process.returncode, printed


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def convert(source: Path, target: Path) -> None:
    target.mkdir()
    (target / TRACKER).write_text("release")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_folder({}) == Path("/home/ada/.cache/megatron_amopo")
    assert cache_folder({"XDG_CACHE_HOME": "relative"}) == Path("/home/ada/.cache/megatron_amopo")
    assert cache_folder({"XDG_CACHE_HOME": "/big"}) == Path("/big/megatron_amopo")
    assert cache_folder({"XDG_CACHE_HOME": "/big", "AMOPO_HF_CACHE": "~/models"}) == Path("/home/ada/models")


def test_the_name_says_what_it_is(source: Path, tmp_path: Path) -> None:
    assert entry_name(source).startswith("Tiny-0.5B-")
    hub = tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots"
    hub.mkdir(parents=True)
    source.rename(hub / "0123abc")
    assert entry_name(hub / "0123abc").startswith("Qwen--Qwen2.5-7B-")


@pytest.mark.parametrize("change", ["config", "header", "size", "time", "tokenizer", "template", "new shard", "format"])
def test_a_changed_folder_has_another_name(source: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, weights = entry_name(source), source / "model.safetensors"
    status = weights.stat()
    if change == "config":
        times = (source / "config.json").stat()
        (source / "config.json").write_text('{"vocab_size": 8}')
        os.utime(source / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "header":
        weights.write_bytes(weights.read_bytes().replace(b"F32", b"I32"))
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "size":
        weights.write_bytes(weights.read_bytes() + b"5")
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "tokenizer":
        (source / "tokenizer.json").write_text('{"a": 1}')
    elif change == "template":
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    elif change == "new shard":
        (source / "model-00002.safetensors").write_bytes(b"")
    else:
        monkeypatch.setattr(import_cache, "ENTRY_FORMAT", import_cache.ENTRY_FORMAT + 1)
    assert entry_name(source) != before


def test_what_no_conversion_reads_changes_nothing(source: Path) -> None:
    before = entry_name(source)
    (source / "README.md").write_text("a model")
    (source / "runs").mkdir()
    assert entry_name(source) == before


def test_the_tracker_is_megatrons() -> None:
    """Written twice so that the cache needs no torch."""
    assert TRACKER == MEGATRON_TRACKER


def test_many_processes_one_import(source: Path, tmp_path: Path, start: Callable) -> None:
    go = tmp_path / "go"
    processes = [start(until=str(go))]
    until(lambda: imports(tmp_path))
    processes += [start(until=str(go)) for _ in range(5)]
    assert f"process {processes[0].pid} on" in until_it_waits(processes[1])
    go.touch()
    entry = tmp_path / "cache" / entry_name(source)
    for process in processes:
        code, printed = result(process)
        assert code == 0
        assert printed.splitlines()[-1] == str(entry)
    assert imports(tmp_path) == 1
    assert folders(tmp_path / "cache") == [entry.name]
    assert result(start()) == (0, f"{entry}\n")
    assert imports(tmp_path) == 1


def test_a_killed_importer(source: Path, tmp_path: Path, start: Callable) -> None:
    """The one who waits takes over, and removes what the dead one left."""
    killed = start(until=str(tmp_path / "never"))
    until(lambda: imports(tmp_path))
    heir = start()
    until_it_waits(heir)
    killed.kill()
    assert result(heir)[0] == 0
    assert imports(tmp_path) == 2
    assert folders(tmp_path / "cache") == [entry_name(source)]


def test_a_failed_importer(source: Path, tmp_path: Path, start: Callable) -> None:
    """Those who wait stop; the next start tries again."""
    go = tmp_path / "go"
    failing = start(until=str(go), fail=True)
    until(lambda: imports(tmp_path))
    waiting = [start() for _ in range(2)]
    for process in waiting:
        until_it_waits(process)
    go.touch()
    code, printed = result(failing)
    assert code == 2
    assert f"ImportFailed: {source}: a shard is damaged" in printed
    for process in waiting:
        code, printed = result(process)
        assert code == 2
        assert f"CheckpointError: {source}: process {failing.pid} on" in printed
        assert "a shard is damaged" in printed
    assert imports(tmp_path) == 1
    assert folders(tmp_path / "cache") == []
    assert result(start())[0] == 0


def test_who_comes_late_to_a_failure(
    source: Path, tmp_path: Path, start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the ranks that one torchrun starts, one tries; its next attempt, with a higher count, tries again."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    failing = start(fail=True)
    assert result(failing)[0] == 2
    code, printed = result(start())
    assert code == 2
    assert f"process {failing.pid} on" in printed
    assert imports(tmp_path) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert result(start())[0] == 0


def test_another_machine_hears_the_reason(
    source: Path, tmp_path: Path, start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = tmp_path / "go"
    start(until=str(go), fail=True)
    until(lambda: imports(tmp_path))
    monkeypatch.setattr(import_cache.platform, "node", lambda: "another")
    monkeypatch.setattr(import_cache, "print", lambda *_, **__: go.touch(), raising=False)  # it says that it waits
    with pytest.raises(CheckpointError, match=r"failed to import it: .*a shard is damaged"):
        import_once(source, tmp_path / "cache", convert)


def test_a_bug_in_the_conversion_is_shown_as_it_is(source: Path, tmp_path: Path) -> None:
    def broken(source: Path, target: Path) -> None:
        raise KeyError("w")

    with pytest.raises(KeyError):
        import_once(source, tmp_path / "cache", broken)
    assert folders(tmp_path / "cache") == []
    assert import_once(source, tmp_path / "cache", convert).is_dir()


def test_a_folder_that_changes_meanwhile(source: Path, tmp_path: Path) -> None:
    def slow(source: Path, target: Path) -> None:
        convert(source, target)
        (source / "config.json").write_text('{"vocab_size": 8}')

    with pytest.raises(ImportFailed, match="changed while it was imported"):
        import_once(source, tmp_path / "cache", slow)
    assert folders(tmp_path / "cache") == []


def test_locks_that_do_not_reach_the_other_machine(source: Path, tmp_path: Path) -> None:
    """Both import, the first to finish gives the entry."""
    first = tmp_path / "cache" / entry_name(source)

    def slow(source: Path, target: Path) -> None:
        convert(source, target)
        convert(source, first)
        (first / "of the first").touch()

    assert import_once(source, tmp_path / "cache", slow) == first
    assert (first / "of the first").exists()
    assert folders(tmp_path / "cache") == [first.name]


def test_no_locks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(import_cache.fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"--amopo-hf-cache .* has no file locks \(Function not implemented\)"):
        import_once(source, tmp_path / "cache", convert)


def test_a_cache_that_can_not_be_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--amopo-hf-cache .*file"):
        import_once(source, tmp_path / "file", convert)


def test_half_an_entry(source: Path, tmp_path: Path) -> None:
    """Somebody has deleted a part of it."""
    (tmp_path / "cache" / entry_name(source)).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="not a whole checkpoint; remove the folder"):
        import_once(source, tmp_path / "cache", convert)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none: can't be read"):
        entry_name(tmp_path / "none")
