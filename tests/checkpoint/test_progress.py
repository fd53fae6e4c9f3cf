"""How far a conversion is: lines in a log, up to 100 %; nothing where nothing was asked for."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_amopo.checkpoint import streaming
from megatron_amopo.checkpoint.streaming import Progress
from tests.support.checkpoints import MakeFolder
from tools import convert_checkpoint


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(streaming, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Share, bytes, time so far and left, and speed."""
    lines = []
    with Progress("import", 4_000_000, shown=True) as bar:
        for seconds in (40, 40, 59, 1, 60):
            clock.now += seconds
            bar.update(800_000)
            lines.append(capsys.readouterr().err)
        assert bar.seconds == 200
    assert lines == [
        "",
        "import:  40% 1.60M/4.00M [01:20<02:00, 20.0kB/s]\n",
        "",
        "import:  80% 3.20M/4.00M [02:20<00:35, 22.9kB/s]\n",
        "import: 100% 4.00M/4.00M [03:20<00:00, 20.0kB/s]\n",
    ]
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_unless_asked_for(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("import", 10, shown=False) as bar:
        clock.now += 3600
        bar.update(10)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_every_command_gets_to_the_end(
    make_folder: MakeFolder,
    small_parts: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a command announces is what it moves: of a tied model, in another type, too."""
    monkeypatch.setattr(streaming, "_SECONDS_BETWEEN_LINES", 0.0)
    original, megatron = str(make_folder(tied=True)), str(tmp_path / "megatron")
    capsys.readouterr()  # transformers' progress of saving it
    for what, arguments in (
        ("import", ["hf-to-megatron", original, megatron]),
        ("export", ["megatron-to-hf", megatron, str(tmp_path / "back")]),
        ("export", ["megatron-to-hf", megatron, str(tmp_path / "half"), "--dtype", "bfloat16"]),
        ("verify", ["verify", str(tmp_path / "half"), megatron]),
    ):
        assert convert_checkpoint.main(arguments) == 0
        lines = capsys.readouterr().err.splitlines()
        found = [re.fullmatch(rf"{what}: +(\d+)% (\S+)/(\S+) \[\S+<\S+, +\S+B/s\]", line) for line in lines]
        assert all(found), lines
        shares = [int(match[1]) for match in found if match]
        assert len(shares) > 100
        assert shares == sorted(shares)
        assert shares[0] < 5
        assert shares[-1] == 100
        last = found[-1]
        assert last is not None
        assert last[2] == last[3]
