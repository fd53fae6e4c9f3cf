"""Generate the demo's preference data: seeded, scored by rule, with conflicts between the dimensions.

For each record a request is drawn and two answers are composed, each of a planned quality per dimension. The scores
in the file are not the plan: they are what ``rules.score`` says of the finished text. The answer with the higher
total is the chosen one and ties are drawn again, so the chosen answer is often the worse one on some dimension.

Takes a seed and counts; gives ``DIR/train.jsonl`` and ``DIR/held_out.jsonl`` in the native format of
``tools/prepare_preferences.py``. No combination of asked words that is held out occurs in the training part, in any
order.

    python examples/data/generate_preferences.py --output runs/demo/data
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.data.rules import (
    COURTESIES,
    DIMENSIONS,
    ENDINGS,
    ITEMS_PER_REQUEST,
    KINDS,
    MARKERS,
    SEPARATORS,
    WORD_LIMITS,
    Request,
    score,
)

OPENINGS = ("Name the {kind} of {items}.", "What are the {kind} of {items}?", "List the {kind} of {items}.")
FORM = (
    "Separate them with {separator}, put {article} {marker} before the list, use at most {word_limit} words "
    "and end with {ending}."
)
# The wordings of each courtesy. Their number keeps a courteous answer from being more predictable, token for token,
# than a bare one: the losses compare length-averaged log-probabilities.
WORDINGS = {
    "greeting": ("Hello!", "Hi there!", "Welcome!", "Good day!"),
    "introduction": tuple(
        f"{opening} {{kind}} {purpose}:"
        for opening in ("Here are the", "Here are all", "These are the", "These are all")
        for purpose in ("asked for", "in order", "as wanted", "for you")
    ),
    "tip": tuple(
        f"Tip: {deed} them {manner}."
        for deed in ("say", "note", "read", "learn")
        for manner in ("aloud", "twice", "daily", "slowly")
    ),
    "offer": tuple(
        f"{offer} {matter}."
        for offer in ("Ask me for", "Let me know of", "Happy to help with", "Want more of")
        for matter in ("others", "such lists", "the next", "anything")
    ),
}
# What may stand where a courtesy is missing: words that help nobody, so that length alone does not tell help from none.
SMALL_TALK = tuple(
    f"{news} {time}."
    for news in ("I was busy", "We were away", "It rained here")
    for time in ("this week", "all day", "once again")
)
BEFORE_LIST = ("greeting", "introduction")
AFTER_LIST = ("tip", "offer")

HELD_OUT_SHARE = 0.2  # of the combinations of asked words, kept for the held-out part
OMISSION = 0.2  # probability that an item which is not to be right is left out; else the common mistake stands there
SMALL_TALK_SHARE = 0.6  # probability that small talk stands where a courtesy other than the greeting is missing
BEST_QUALITY = 0.9  # largest probability with which one point is planned to be met
SHARED_QUALITY = 0.5  # how far the dimensions' qualities of one answer go together; 0 is independent, 1 the same


Combination = tuple[str, tuple[str, ...]]  # kind, asked words in no order


@dataclass(frozen=True)
class Plan:
    """What an answer is composed to be: points aimed at, of four, four and three.

    The fourth rule of form, the word limit, falls out of the rest.
    """

    courtesies: int
    right_items: int
    form_rules: int


def request_text(request: Request, opening: str = OPENINGS[0]) -> str:
    """The request in words; ``rules.parse`` is its inverse for every opening."""
    *first, last = request.items
    items = f"{', '.join(first)} and {last}"
    form = FORM.format(
        separator=request.separator,
        article="an" if request.marker[0] in "aeiou" else "a",
        marker=request.marker,
        word_limit=request.word_limit,
        ending=request.ending,
    )
    return f"{opening.format(kind=request.kind, items=items)} {form}"


def draw_plan(rng: random.Random) -> Plan:
    """Qualities that vary by themselves in each dimension, around a level that the whole answer shares."""
    shared = rng.random()

    def points(most: int) -> int:
        quality = BEST_QUALITY * (SHARED_QUALITY * shared + (1 - SHARED_QUALITY) * rng.random())
        return sum(rng.random() < quality for _ in range(most))

    return Plan(courtesies=points(len(COURTESIES)), right_items=points(ITEMS_PER_REQUEST), form_rules=points(3))


def compose_answer(rng: random.Random, request: Request, plan: Plan) -> str:
    """An answer that keeps to the plan: which courtesies, items and rules are met is drawn, how many is planned."""
    courtesies = set(rng.sample(sorted(COURTESIES), plan.courtesies))
    kept = set(rng.sample(("separator", "marker", "ending"), plan.form_rules))
    separator = SEPARATORS[request.separator]
    if "separator" not in kept:
        separator = "," if separator != "," else "-"

    def say(names: Sequence[str]) -> list[str]:
        said = []
        for name in names:
            if name in courtesies:
                said.append(rng.choice(WORDINGS[name]).format(kind=request.kind))
            elif name != "greeting" and rng.random() < SMALL_TALK_SHARE:
                said.append(rng.choice(SMALL_TALK))
        return said

    parts = say(BEFORE_LIST)
    if "marker" in kept:
        parts.append(MARKERS[request.marker])
    spacing = f"{separator} " if separator in ",;" else f" {separator} "
    parts.append(spacing.join(_answer_words(rng, request, plan.right_items)))
    parts += say(AFTER_LIST)
    if "ending" in kept:
        parts.append(request.ending)
    return " ".join(parts)


def _answer_words(rng: random.Random, request: Request, right: int) -> list[str]:
    """The list of an answer: ``right`` of the expected words in their places, the others mistaken or left out."""
    right_places = set(rng.sample(range(ITEMS_PER_REQUEST), right))
    answers = [KINDS[request.kind][item] for item in request.items]
    words = [
        expected if place in right_places else mistake
        for place, (expected, mistake) in enumerate(answers)
        if place in right_places or rng.random() >= OMISSION
    ]
    if len(words) > 1:  # or there would be nothing to separate
        return words
    return [expected if place in right_places else mistake for place, (expected, mistake) in enumerate(answers)]


def draw_record(rng: random.Random, combination: Combination) -> dict[str, Any]:
    """One preference record (without its id) over one combination of asked words; totals of the two answers differ."""
    kind, words = combination
    request = Request(
        kind=kind,
        items=tuple(rng.sample(words, len(words))),
        separator=rng.choice(list(SEPARATORS)),
        marker=rng.choice(list(MARKERS)),
        word_limit=rng.choice(WORD_LIMITS),
        ending=rng.choice(ENDINGS),
    )
    prompt = request_text(request, rng.choice(OPENINGS))
    while True:
        answers = [compose_answer(rng, request, draw_plan(rng)) for _ in range(2)]
        scored = [{"content": answer, "scores": score(request, answer)} for answer in answers]
        totals = [sum(side["scores"].values()) for side in scored]  # type: ignore[attr-defined]
        if totals[0] != totals[1]:
            better = totals.index(max(totals))
            return {"prompt": prompt, "chosen": scored[better], "rejected": scored[1 - better]}


def split_combinations(
    rng: random.Random,
) -> tuple[list[Combination], list[Combination]]:
    """All combinations of asked words, shuffled and cut into those to train on and those to hold out."""
    every = [(kind, words) for kind in KINDS for words in combinations(KINDS[kind], ITEMS_PER_REQUEST)]
    rng.shuffle(every)
    held_out = round(HELD_OUT_SHARE * len(every))
    return every[held_out:], every[:held_out]


def generate(seed: int, records: int, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training and the held-out records: every prompt occurs once. A function of the arguments alone."""
    train_part, held_out_part = split_combinations(random.Random(f"{seed}/split"))
    seen: set[str] = set()
    return (
        list(_distinct_records(random.Random(f"{seed}/train"), train_part, records, "train", seen)),
        list(_distinct_records(random.Random(f"{seed}/held-out"), held_out_part, held_out, "held-out", seen)),
    )


def _distinct_records(
    rng: random.Random, pool: list[Combination], count: int, name: str, seen: set[str]
) -> Iterator[dict[str, Any]]:
    made = 0
    while made < count:
        record = draw_record(rng, pool[made % len(pool)])
        if record["prompt"] not in seen:
            seen.add(record["prompt"])
            yield {"id": f"{name}-{made:06d}", **record}
            made += 1


def conflict_rate(records: Sequence[dict[str, Any]]) -> float:
    """The share of records whose chosen answer scores lower than the rejected one on some dimension."""
    return sum(
        any(record["chosen"]["scores"][name] < record["rejected"]["scores"][name] for name in DIMENSIONS)
        for record in records
    ) / len(records)


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write beside and rename, so that a file under this name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    with beside.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(beside, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: generate, write both files, and print what is in them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write the two files to")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same files (default: %(default)s)")
    parser.add_argument("--records", type=int, default=2000, help="training records (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=400, help="held-out records (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.records < 1 or options.held_out < 1:
        parser.error("--records and --held-out must be at least 1")

    parts = dict(zip(("train", "held_out"), generate(options.seed, options.records, options.held_out), strict=True))
    for name, records in parts.items():
        path = options.output / f"{name}.jsonl"
        write_jsonl(path, records)
        print(f"{path}: {len(records)} records; chosen worse on some dimension: {conflict_rate(records):.0%}")
        for dimension in DIMENSIONS:
            for side in ("chosen", "rejected"):
                counts = Counter(record[side]["scores"][dimension] for record in records)
                shares = "  ".join(f"{level}: {counts[level] / len(records):4.0%}" for level in range(1, 6))
                print(f"  {dimension:22}{side:10}{shares}")


if __name__ == "__main__":
    main()
