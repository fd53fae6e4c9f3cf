"""The demo's scorer on hand-made answers: every point it gives or withholds has a case here."""

import dataclasses

import pytest

from examples.data.rules import DIMENSIONS, KINDS, Request, parse, score

PROMPT = (
    "Name the capitals of Brazil, Italy, India and Canada. Separate them with dashes, put a star before the list, "
    "use at most 18 words and end with done."
)
REQUEST = Request(
    kind="capitals",
    items=("Brazil", "Italy", "India", "Canada"),
    separator="dashes",
    marker="star",
    word_limit=18,
    ending="done",
)
RIGHT = "* Brasilia - Rome - Delhi - Ottawa done"


def test_parse_reads_the_request() -> None:
    assert parse(PROMPT) == REQUEST
    assert REQUEST.expected == ("Brasilia", "Rome", "Delhi", "Ottawa")


def test_parse_finds_the_request_within_other_text() -> None:
    around = f"Focus on correctness. Scale: 1 poor, 5 complete. Give an answer worth 4.\n\n{PROMPT}\nassistant\n"
    assert parse(around) == REQUEST


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("Write a poem.", "no request"), (PROMPT.replace("Brazil", "Narnia"), "'Narnia'"), ("", "no request")],
)
def test_parse_refuses_other_text(prompt: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(prompt)


@pytest.mark.parametrize(
    ("answer", "helpfulness", "correctness", "instruction_following"),
    [
        # a bare answer that is right and keeps to every rule
        (RIGHT, 1, 5, 5),
        (RIGHT.upper(), 1, 5, 5),
        # one courtesy after the other, while the words last
        (f"Hello! {RIGHT}", 2, 5, 5),
        (f"Hello! Here are the capitals: {RIGHT}", 3, 5, 5),
        ("Hello! Here are the capitals: * Brasilia - Rome - Delhi - Ottawa Tip: say them aloud. done", 4, 5, 5),
        # the last courtesy is one too many for 18 words
        (
            "Hello! Here are the capitals: * Brasilia - Rome - Delhi - Ottawa Tip: say them aloud. "
            "Let me know if you need more. done",
            5,
            5,
            4,
        ),
        # saying a courtesy twice counts once
        (f"Hello! Hi! Welcome! {RIGHT}", 2, 5, 5),
        # items: mistakes, echoes and omissions earn nothing; order doesn't matter
        ("* Rio - Rome - Mumbai - Ottawa done", 1, 3, 5),
        ("* Brazil - Italy - India - Canada done", 1, 1, 5),
        ("* Rome - Ottawa done", 1, 3, 5),
        ("* Ottawa - Delhi - Rome - Brasilia done", 1, 5, 5),
        ("* Rome - Rome - Rome - Rome done", 1, 2, 5),
        # only the first four words of a list count
        ("* Rio - Milan - Mumbai - Toronto - Brasilia - Rome - Delhi - Ottawa done", 1, 1, 5),
        # form: separator (all gaps must have it), marker, ending
        ("* Brasilia, Rome, Delhi, Ottawa done", 1, 5, 4),
        ("* Brasilia - Rome, Delhi - Ottawa done", 1, 5, 4),
        ("# Brasilia - Rome - Delhi - Ottawa done", 1, 5, 4),
        ("* Well: Brasilia - Rome - Delhi - Ottawa done", 1, 5, 4),
        ("* Brasilia - Rome - Delhi - Ottawa", 1, 5, 4),
        ("done * Brasilia - Rome - Delhi - Ottawa over", 1, 5, 4),
        ("Brasilia Rome Delhi Ottawa", 1, 5, 2),
        (" ".join(["word"] * 19), 1, 1, 1),
        # texts of any kind have scores
        ("", 1, 1, 1),
        ("!!! \n\t* ", 1, 1, 1),
        ("Rome", 1, 2, 2),
        ("\ud83d\ude00 <|im_end|> \x00 ü done", 1, 1, 3),
    ],
)
def test_score(answer: str, helpfulness: int, correctness: int, instruction_following: int) -> None:
    assert score(REQUEST, answer) == {
        "helpfulness": helpfulness,
        "correctness": correctness,
        "instruction_following": instruction_following,
    }


def test_score_depends_on_the_request() -> None:
    other = dataclasses.replace(REQUEST, separator="commas", marker="plus", word_limit=3, ending="bye")
    assert score(other, RIGHT)["instruction_following"] == 1
    assert (
        score(dataclasses.replace(REQUEST, kind="opposites", items=("hot", "big", "fast", "high")), "cold")[
            "correctness"
        ]
        == 2
    )
    assert tuple(score(REQUEST, RIGHT)) == DIMENSIONS


def test_no_word_of_a_kind_means_two_things() -> None:
    for kind, words in KINDS.items():
        every = [word.casefold() for asked, answers in words.items() for word in (asked, *answers)]
        assert len(set(every)) == len(every), kind
