"""The judge: a local server that answers as an endpoint does, is busy, silent, or refuses."""

from __future__ import annotations

import contextlib
import email.utils
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_amopo.errors import ConfigError
from megatron_amopo.sampling.answered import Answered
from megatron_amopo.sampling.scorers import judge as judge_module
from megatron_amopo.sampling.scorers.judge import KEY_VARIABLE, Judge, JudgeFailed
from megatron_amopo.sampling.scorers.score import Score
from tests.sampling.conftest import PLAIN

ROOT = Path(__file__).resolve().parents[2]


class _Stub(BaseHTTPRequestHandler):
    """Answers with the next of `replies`: text of a judge, or an HTTP status."""

    replies: list[str | int]
    finish_reason = "stop"
    requests: list[dict]
    location: str
    retry_after: str | None = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        reply = self.replies.pop(0)
        choice = {"message": {"content": reply}, "finish_reason": self.finish_reason}
        content = json.dumps({"choices": [choice]}).encode()
        self.send_response(reply if isinstance(reply, int) else 200)
        if reply == 302:
            self.send_header("Location", self.location)
        if self.retry_after is not None:
            self.send_header("Retry-After", self.retry_after)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def stub(*replies: str | int) -> Iterator[tuple[str, list[dict]]]:
    handler = type("Handler", (_Stub,), {"replies": list(replies), "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", handler.requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answered(prompt: str = "Why?", answer: str = "So.") -> Answered:
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Answered("1", 1, turns, "line 1")


def grade(judge: Judge) -> Score:
    """Of one answer."""
    ((place, score),) = judge.score([answered()])
    assert place == 0
    return score


def test_a_judge_grades(score, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with stub("Not [[3]] but [[7]]", "I can't say.") as (url, requests):
        found = score(PLAIN, f"judge:{url}", "--judge-model", "m", "--judge-concurrency", "1")
    assert [row["scores"] for row in found] == [{"grade": 7}, {}]
    assert found[1]["said"] == "I can't say."
    assert [(one["path"], one["key"], one["model"]) for one in requests] == [
        ("/v1/chat/completions", "Bearer secret", "m")
    ] * 2
    assert requests[0]["messages"][1]["content"] == "[User]\nWhy?\n\n[Answer]\nWhy? So."


def test_a_busy_judge_is_asked_again_and_a_refusal_is_said(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with stub(503, 429, "[[10]]") as (url, requests):
        assert grade(Judge(url, "m", first_wait_s=0.01)) == Score({"grade": 10}, "[[10]]")
        assert [one["key"] for one in requests] == [None] * 3
    with stub(401) as (url, requests), pytest.raises(JudgeFailed, match="refuses: HTTP 401"):
        grade(Judge(url, "m", first_wait_s=0.01))
    assert len(requests) == 1
    with stub(500, 500) as (url, _), pytest.raises(JudgeFailed, match="in 2 attempts"):
        grade(Judge(url, "m", first_wait_s=0.01, attempts=2))
    with pytest.raises(JudgeFailed, match="no answer in 2 attempts"):  # nobody listens there any more
        grade(Judge(url, "m", first_wait_s=0.01, attempts=2))


def test_the_key_is_neither_shown_nor_sent_to_another_host(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret\n")
    with stub("[[9]]") as (url, requests):
        grade(Judge(url, "m"))
    assert requests[0]["key"] == "Bearer secret"
    with stub("[[9]]") as (other, led_to), stub(302) as (url, _):
        monkeypatch.setattr(_Stub, "location", f"{other}/chat/completions", raising=False)
        with pytest.raises(JudgeFailed, match="refuses: HTTP 302"):
            grade(Judge(url, "m"))
    assert led_to == []
    monkeypatch.setenv(KEY_VARIABLE, "secret\nX-Other: 1")
    with pytest.raises(ConfigError, match="AMOPO_JUDGE_API_KEY holds") as error:
        Judge("http://localhost", "m")
    assert "secret" not in str(error.value)


def test_a_silent_judge_times_out():
    release = threading.Event()

    class Silent(_Stub):
        def do_POST(self) -> None:
            release.wait(10)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        judge = Judge(f"http://127.0.0.1:{server.server_address[1]}", "m", timeout_s=0.1, attempts=1)
        with pytest.raises(JudgeFailed, match="timed out"):
            grade(judge)
    finally:
        release.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_an_answer_that_the_judge_refuses_has_no_score(score, status):
    with stub(status, "[[7]]") as (url, requests):
        found = score(PLAIN, f"judge:{url}", "--judge-model", "m", "--judge-concurrency", "1")
    assert [row["scores"] for row in found] == [{}, {"grade": 7}]
    assert found[0]["reason"].startswith(f"HTTP {status} ")
    assert "reason" not in found[1]
    assert len(requests) == 2


def test_a_reply_that_was_cut_off_has_no_score(monkeypatch):
    monkeypatch.setattr(_Stub, "finish_reason", "length")
    with stub("A [[3]] would be one that") as (url, _):
        found = grade(Judge(url, "m", max_tokens=9))
    assert found == Score({}, "A [[3]] would be one that", reason="the judge's reply was cut off at 9 tokens")


def test_a_judge_that_refuses_all_of_the_first_ends(score, tmp_path: Path):
    """A wrong model or setting, which would make a file without any score; a few refusals among replies don't."""
    many = [{**PLAIN[0], "id": str(number)} for number in range(8)]
    flags = ["--judge-model", "m", "--judge-concurrency", "1"]
    with stub(*[400] * 8) as (url, requests):
        said = score(many, f"judge:{url}", *flags, code=2)
        assert "refuses each of the first 5 questions: HTTP 400" in said
    assert len(requests) <= 6  # one may be asked already
    assert not (tmp_path / "scores").exists()
    with stub(400, 400, 400, 400, "[[7]]", 400, 400, 400) as (url, _):
        found = list(Judge(url, "m", at_a_time=1).score([answered()] * 8))
    assert sorted(place for place, _ in found) == list(range(8))
    assert [place for place, one in found if one.scores] == [4]


def test_what_is_graded_is_kept_when_the_judge_fails(score, tmp_path: Path):
    flags = ["--judge-model", "m", "--judge-concurrency", "1"]
    with stub("[[7]]", 401, "[[8]]") as (url, requests):
        assert "refuses: HTTP 401" in score(PLAIN, f"judge:{url}", *flags, code=2)
        assert "other inputs or settings" in score(PLAIN, f"judge:{url}", "--judge-model", "n", code=2)
        found = score(PLAIN, f"judge:{url}", *flags)
    assert [row["scores"] for row in found] == [{"grade": 7}, {"grade": 8}]
    assert len(requests) == 3
    assert not (tmp_path / "scores.partial").exists()


def test_what_no_encoding_can_hold_is_replaced(score):
    with stub("\ud800 [[7]]") as (url, _):
        (row,) = score(PLAIN[:1], f"judge:{url}", "--judge-model", "m")
    assert (row["scores"], row["said"]) == ({"grade": 7}, "? [[7]]")


def test_how_long_a_server_asks_to_wait():
    now = time.time()
    assert judge_module._asked_to_wait("2.5") == 2.5
    assert judge_module._asked_to_wait("1e999") == float("inf")  # cut to a minute
    date = judge_module._asked_to_wait(email.utils.formatdate(now + 30, usegmt=True))
    assert date == pytest.approx(30, abs=5)
    for none in ("", "-1", "0", "nan", "soon", email.utils.formatdate(now - 30, usegmt=True), "Mon, 99 Foo 9999 x"):
        assert judge_module._asked_to_wait(none) is None, none


@pytest.mark.parametrize("retry_after", ["-5", "nan", "1e999", "soon"])
def test_a_busy_judge_may_ask_for_any_wait(monkeypatch, retry_after):
    monkeypatch.setattr(_Stub, "retry_after", retry_after)
    monkeypatch.setattr(judge_module, "_LONGEST_WAIT_S", 0.01)
    with stub(429, 503, "[[3]]") as (url, _):
        assert grade(Judge(url, "m", first_wait_s=0.01)).scores == {"grade": 3}


def test_an_interruption_ends_a_silent_judge_at_once_and_keeps_grades(tmp_path: Path):
    """The second question is being asked, and nobody waits for its answer."""
    asked = threading.Event()

    class Silent(_Stub):
        def do_POST(self) -> None:
            if self.replies:
                return super().do_POST()
            asked.set()
            time.sleep(20)

    handler = type("Handler", (Silent,), {"replies": ["[[7]]"], "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    (tmp_path / "answers").write_text("".join(json.dumps(record) + "\n" for record in PLAIN))
    command = [sys.executable, "tools/score_answers.py", str(tmp_path / "answers"), "--output", str(tmp_path / "out")]
    url = f"http://127.0.0.1:{server.server_address[1]}"
    command += ["--scorer", f"judge:{url}", "--judge-model", "m", "--judge-concurrency", "1"]
    # A shell that starts the tests in the background has them, and so the command, ignore interruptions.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        assert asked.wait(60)
        # The second question is asked while the first grade is on its way to the file.
        graded, end = tmp_path / "out.partial", time.monotonic() + 60
        while not (graded.exists() and len(graded.read_text().splitlines()) == 2) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, said = process.communicate(timeout=15)
        assert time.monotonic() - start < 10
    finally:
        process.kill()
        server.shutdown()
        server.server_close()
    assert process.returncode == 130
    assert "the same command goes on from here" in said
    kept = [json.loads(line) for line in (tmp_path / "out.partial").read_text().splitlines()[1:]]
    assert [line["scores"] for line in kept] == [{"grade": 7}]
