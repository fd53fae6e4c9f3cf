"""A small byte-level tokenizer with a ChatML template, made once, and short ways to write records and to prepare
them.
"""

import json
from pathlib import Path

import pytest

from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.prepare import PrepareOptions, prepare

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(folder: Path, template: str = CHATML, special: list[str] = SPECIAL, eos: str = "<|im_end|>") -> Path:
    """Save a byte-level BPE tokenizer with every byte in its vocabulary and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["You are an expert at answering. the the response of a dimension"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=special[0])
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


def native(prompt="Why?", chosen="Because.", rejected="No.", chosen_scores=(5, 4), rejected_scores=(2, 3)) -> dict:
    """A native record with the dimensions a and b."""
    return {
        "prompt": prompt,
        "chosen": {"content": chosen, "scores": dict(zip("ab", chosen_scores, strict=True))},
        "rejected": {"content": rejected, "scores": dict(zip("ab", rejected_scores, strict=True))},
    }


def write_lines(path: Path, records) -> Path:
    """Write records (objects, text or bytes) as JSONL."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture
def prepared(tmp_path, tokenizer_dir):
    """`prepared(records, **options)` prepares records with the dimensions a and b; gives the train split and the
    report's content.
    """

    def run(records, name="out", **options):
        if not isinstance(records, Path):
            records = write_lines(tmp_path / f"{name}.jsonl", records)
        given = {"inputs": (records,), "output": tmp_path / name, "tokenizer": tokenizer_dir, "dimensions": ("a", "b")}
        prepare(PrepareOptions(**{**given, **options}))
        output = options.get("output", tmp_path / name)
        return PreparedGroups.open(output), json.loads((output / "report.json").read_text())

    return run


@pytest.fixture(scope="session")
def decode(tokenizer_dir):
    """Token ids back to text, control tokens included."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    return lambda ids: backend.decode(list(ids), skip_special_tokens=False)
