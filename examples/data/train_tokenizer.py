"""Train the demo's small tokenizer: byte-level BPE with a ChatML template, as a normal Hugging Face tokenizer folder.

A tokenizer made for the task's text keeps the demo's sequences short: nearly every word is one token. Being
byte-level, it still encodes any text. The three files are written directly (not through ``save_pretrained``), because
transformers 5 names a tokenizer class that transformers 4 does not know; in this form both load the folder with
``AutoTokenizer``.

Takes the generated preference data and the dimension prompts; gives ``DIR/tokenizer.json``, ``tokenizer_config.json``
and ``special_tokens_map.json``.

    python examples/data/train_tokenizer.py --data runs/demo/data/train.jsonl --output runs/demo/tokenizer
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.data.rules import DIMENSIONS
from megatron_amopo.data.prompts import PromptStyle

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
VOCABULARY = 1000  # at most; deliberately no multiple of 128, so that the demo shows the padding of the vocabulary
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# How Qwen2 cuts text before BPE. Beside a Qwen2 config.json transformers 5 takes this and NFC, whatever tokenizer.json
# says: only a tokenizer that has both is the same tokenizer everywhere.
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_LENGTH = 512
PROMPTS = Path(__file__).with_name("prompts.yaml")


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE tokenizer over ``texts``; the special tokens take the first ids. Deterministic in the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that ``AutoTokenizer.from_pretrained`` reads under transformers 4 and 5."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"eos_token": TURN_END, "pad_token": END_OF_TEXT}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "additional_special_tokens": [TURN_START],
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def demo_texts(data: Path, prompts: Path) -> Iterator[str]:
    """What the model will read: requests and answers of a native JSONL file, every dimension prompt, the names of the
    turns.

    The latter come once per record, so that they weigh as much as the requests do.
    """
    style = PromptStyle.load(prompts)
    every_turn = [text for level in range(1, 6) for text in style.texts(DIMENSIONS, [level] * len(DIMENSIONS))]
    every_turn += ["system", "user", "assistant"]
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield from (record["prompt"], record["chosen"]["content"], record["rejected"]["content"], *every_turn)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train on one preference file and save the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="preference records, native JSONL")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="tokenizer folder to write")
    parser.add_argument(
        "--prompts", type=Path, default=PROMPTS, metavar="FILE", help="dimension prompts (default: %(default)s)"
    )
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="largest size (default: %(default)s)")
    options = parser.parse_args(arguments)
    tokenizer = train_tokenizer(demo_texts(options.data, options.prompts), options.vocabulary)
    save_tokenizer(tokenizer, options.output)
    print(f"{options.output}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
