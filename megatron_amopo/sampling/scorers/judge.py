"""Scores by a judge: a chat model behind an endpoint that speaks OpenAI's protocol, a vLLM server for one.

The judge sees the conversation, is asked to grade its last answer from 1 to 10, and ends with `[[grade]]`, as
MT-bench's single-answer grading has it; the wording is ours. The key comes from an environment variable alone.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_amopo.errors import AmopoError, ConfigError
from megatron_amopo.sampling.answered import Answered
from megatron_amopo.sampling.scorers.score import Score

KEY_VARIABLE = "AMOPO_JUDGE_API_KEY"
SCORE = "grade"
_LOWEST, _HIGHEST = 1, 10
_GRADE = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_PASSING = (408, 409, 429, 500, 502, 503, 504)  # states of a server in which trying again helps
_UNANSWERABLE = (400, 413, 422)  # of one question: too long for the judge, or what its filter won't have
_LONGEST_WAIT_S = 60.0
_ALL_REFUSED = 5  # so many refusals before any reply are of the settings, not of the questions
_TASK = """\
Grade the last answer in the conversation below. Judge whether it is helpful, correct, relevant, deep enough and keeps \
to what was asked; its length alone counts for nothing. Explain your judgement in a few sentences, then end with the \
grade, a whole number from 1 (useless) to 10 (could not be better), in double brackets, like this: [[5]]"""


class JudgeFailed(AmopoError):
    """The endpoint gave no answer, after all attempts."""


class _Unanswerable(Exception):
    """The endpoint refuses this question; the message says why."""


class _CutOff(Exception):
    """The reply ended at `max_tokens`; the message is what there is of it."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn the question into one without a body."""

    def redirect_request(self, *_: Any) -> None:
        return None  # so that it is an error like any other state


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclass(frozen=True)
class Judge:
    """`url` is the endpoint's base, such as http://localhost:8000/v1, or the whole path of its chat completions.
    `attempts` are made where it is busy or silent for `timeout_s`, with doubling waits between.
    """

    url: str
    model: str
    timeout_s: float = 120.0
    attempts: int = 5
    at_a_time: int = 4
    first_wait_s: float = 1.0
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--scorer judge:{self.url}: a URL with http:// or https://")
        _key()

    @property
    def identity(self) -> Mapping[str, Any]:
        """What grades depend on."""
        return {"judge": self.url, "model": self.model, "max_tokens": self.max_tokens, "task": _TASK}

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, Score]]:
        """As they come, `at_a_time` of them asked for. Answers without a grade in brackets, whose reply is cut off or
        which the endpoint refuses have no score. Raises JudgeFailed, also where it refuses all of the first.
        """
        places: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(len(answers)):
            places.put(place)
        graded: queue.SimpleQueue[tuple[int, Score] | Exception] = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            while not stopped.is_set():
                try:
                    place = places.get_nowait()
                    graded.put((place, self._grade(answers[place], stopped)))
                except queue.Empty:
                    return
                except Exception as error:  # raised where grades are read
                    graded.put(error)
                    return

        # Not a pool, which waits for its threads when the process ends: an interruption leaves questions unanswered.
        for _ in range(min(self.at_a_time, len(answers))):
            threading.Thread(target=work, daemon=True).start()
        try:
            refused: list[tuple[int, Score]] | None = []  # held back while nothing else has come
            for _ in answers:
                found = graded.get()
                if isinstance(found, Exception):
                    raise found
                if refused is None:
                    yield found
                elif found[1].said is not None:
                    yield from [*refused, found]
                    refused = None
                else:
                    refused.append(found)
                    if len(refused) == _ALL_REFUSED:
                        raise JudgeFailed(
                            f"the judge at {self.url} refuses each of the first {_ALL_REFUSED} questions: "
                            f"{found[1].reason}"
                        )
            yield from refused or ()
        finally:
            stopped.set()

    def _grade(self, answered: Answered, stopped: threading.Event) -> Score:
        turns = "\n\n".join(
            f"[{'User' if message['role'] == 'user' else 'Answer'}]\n{message['content']}"
            for message in answered.conversation
        )
        try:
            said = self._ask([{"role": "system", "content": _TASK}, {"role": "user", "content": turns}], stopped)
        except _Unanswerable as error:
            return Score({}, reason=str(error))
        except _CutOff as error:
            return Score({}, str(error), reason=f"the judge's reply was cut off at {self.max_tokens} tokens")
        # The last one: a judge may mention grades on the way.
        grades = [float(grade) for grade in _GRADE.findall(said)]
        if grades and _LOWEST <= grades[-1] <= _HIGHEST:
            return Score({SCORE: grades[-1]}, said)
        return Score({}, said, reason=f"no grade from {_LOWEST} to {_HIGHEST} in double brackets at its end")

    def _ask(self, messages: list[dict[str, str]], stopped: threading.Event) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        wait = self.first_wait_s
        for attempt in range(1, self.attempts + 1):
            try:
                reply = self._post(body)
                choice = reply["choices"][0]
                said = str(choice["message"]["content"] or "")
                said = said.encode("utf-8", "replace").decode()  # half of a surrogate pair can't be written
                if choice.get("finish_reason") == "length":  # a grade in it may be one mentioned on the way
                    raise _CutOff(said)
                return said
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}: {_detail(error)}"
                if error.code in _UNANSWERABLE:
                    raise _Unanswerable(reason) from error
                if error.code not in _PASSING:
                    raise JudgeFailed(f"the judge at {self.url} refuses: {reason}") from error
                wait = _asked_to_wait(error.headers.get("Retry-After", "")) or wait
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                reason = str(error) or type(error).__name__  # no connection, timeout, not JSON
            except (KeyError, IndexError, TypeError) as error:
                raise JudgeFailed(f"the judge at {self.url} doesn't answer as a chat endpoint ({error!r})") from error
            if attempt < self.attempts and stopped.wait(min(wait, _LONGEST_WAIT_S)):
                break
            wait *= 2
        raise JudgeFailed(f"the judge at {self.url} gave no answer in {self.attempts} attempts ({reason})")

    def _post(self, body: dict[str, Any]) -> Any:
        path = "/chat/completions"
        url = self.url if self.url.endswith(path) else self.url.rstrip("/") + path
        headers = {"Content-Type": "application/json"}
        if key := _key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        with _OPENER.open(request, timeout=self.timeout_s) as reply:
            return json.load(reply)


def _key() -> str:
    """The key, empty without one. What is wrong with it is said without showing it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()  # files and shells add line ends
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE} holds characters that no key has: printable ASCII is expected")
    return key


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(500).decode("utf-8", "replace").split())  # in a line
    except (OSError, http.client.HTTPException):
        return ""


def _asked_to_wait(retry_after: str) -> float | None:
    """Seconds that a server asks for, as a number or as the date until which to wait (RFC 9110, section 10.2.3); None
    where it doesn't say, or means the past.
    """
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if seconds > 0 else None
