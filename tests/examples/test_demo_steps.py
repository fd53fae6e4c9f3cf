"""Running the demo's commands: order, logs, what is shown of a failure, and how far a running step is."""

import io
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from examples import demo_steps
from examples.demo_steps import Step, StepFailed, run_steps, share_done


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _run(steps: list[Step], folder: Path) -> str:
    shown = io.StringIO()
    run_steps(steps, folder / "logs", Console(file=shown, width=100), cwd=folder, environment=dict(os.environ))
    return shown.getvalue()


def test_steps_run_in_order_with_a_log_each(tmp_path: Path) -> None:
    steps = [
        Step("one", "write a file", 1, None, _python("open('made', 'w').write('x'); print('wrote')")),
        Step("two", "read it", 1, None, _python("import sys; print(open('made').read(), file=sys.stderr)")),
    ]
    shown = _run(steps, tmp_path)
    assert (tmp_path / "logs/one.log").read_text() == "wrote\n"
    assert (tmp_path / "logs/two.log").read_text() == "x\n"
    assert [line.split("  ")[0] for line in shown.splitlines() if line[:1].isdigit()] == [
        "1/2 write a file",
        "2/2 read it",
    ]


def test_a_failure_stops_and_shows_the_end_of_the_log(tmp_path: Path) -> None:
    code = "for n in range(99): print('line', n)\nraise SystemExit('the disk is full')"
    steps = [Step("bad", "fail", 1, None, _python(code)), Step("next", "never", 1, None, _python("open('ran', 'w')"))]
    with pytest.raises(StepFailed) as failure:
        _run(steps, tmp_path)
    message = str(failure.value)
    assert "'fail' failed with status 1" in message
    assert "the disk is full" in message
    assert "line 98" in message
    assert "line 2\n" not in message
    assert str(tmp_path / "logs/bad.log") in message
    assert not (tmp_path / "ran").exists()


def test_a_step_that_makes_nothing_has_failed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    _run([Step("good", "make it", 1, made, _python("open('made', 'w')"))], tmp_path)
    made.unlink()
    with pytest.raises(StepFailed, match=f"'make it' ended without making {made}"):
        _run([Step("bad", "make it", 1, made, _python("print('all is well')"))], tmp_path)


def test_an_interrupt_ends_the_step_and_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('pid', 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )

    def interrupt_when_started(log: Path, clock_share: float) -> float:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(demo_steps, "share_done", interrupt_when_started)
    with pytest.raises(KeyboardInterrupt):
        _run([Step("long", "sleep", 1, None, _python(code))], tmp_path)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    assert not _alive(pid)


@pytest.mark.parametrize(
    ("log", "clock_share", "share"),
    [
        ("", 0.5, 0.5),
        ("starting\n", 3.0, 0.9),
        ("step 30/60 | loss 1.2\n", 0.0, 0.55),
        ("step 10/60\nstep 59/60\n", 0.0, 0.985),
        ("step 60/60\n", 0.0, 0.99),
        ("misstep 5/10, step 7 of 10\n", 0.25, 0.25),
    ],
)
def test_share_done(tmp_path: Path, log: str, clock_share: float, share: float) -> None:
    (tmp_path / "log").write_text(log)
    assert share_done(tmp_path / "log", clock_share) == pytest.approx(share)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
