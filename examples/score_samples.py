"""Let models answer held-out requests and score the answers by rule: what alignment did to what a model says.

Preference accuracy compares given answers; this looks at the model's own. Each model samples one answer to each
request under the general prompt (temperature 1, seeded), and ``rules.score`` scores it.

Takes model folders, the held-out records and the dimension prompts; prints each model's mean scores and its first
answer, and can write the means as JSON.

    python examples/score_samples.py --model DIR --model DIR --data held_out.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.data.rules import DIMENSIONS, parse, score
from megatron_amopo.data.prompts import PromptStyle

PROMPTS = Path(__file__).with_name("data") / "prompts.yaml"
MAX_NEW_TOKENS = 64


def general_conversations(requests: Sequence[str], prompts: Path) -> list[list[dict[str, str]]]:
    """The requests as conversations under the prompt that names all dimensions."""
    style = PromptStyle.load(prompts)
    # The scores are for the dimensions' own prompts, which come after the general one.
    scores = [style.scale[1]] * len(DIMENSIONS)
    return [style.conversations([{"role": "user", "content": text}], DIMENSIONS, scores)[0] for text in requests]


def sample_answers(folder: Path, conversations: Sequence[list[dict[str, str]]], seed: int) -> list[str]:
    """One answer of the model in ``folder`` to each conversation."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(str(folder)).float().eval()
    texts = [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in conversations
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
        )
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def mean_scores(requests: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Mean rule score of each dimension, 1-5."""
    scores = [score(parse(request), answer) for request, answer in zip(requests, answers, strict=True)]
    return {name: sum(each[name] for each in scores) / len(scores) for name in DIMENSIONS}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: sample, score, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, action="append", required=True, metavar="DIR", help="may be repeated")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="records whose requests to answer")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="dimension prompts")
    parser.add_argument("--requests", type=int, default=200, help="how many of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the mean scores here, a list in the models' order"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    with options.data.open(encoding="utf-8") as lines:
        requests = [json.loads(line)["prompt"] for line in islice(lines, options.requests)]
    conversations = general_conversations(requests, options.prompts)
    means = []
    print(f"request: {requests[0]}")
    for model in options.model:
        answers = sample_answers(model, conversations, options.seed)
        means.append(mean_scores(requests, answers))
        print(f"{model}: {answers[0]}")
        print(f"  mean of {len(answers)}: " + ", ".join(f"{name} {value:.2f}" for name, value in means[-1].items()))
    if options.json:
        options.json.write_text(json.dumps(means) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
