"""A tiny model's config, a tokenizer and preference pairs for the benchmarks' tests."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from examples.data.train_tokenizer import save_tokenizer, train_tokenizer
from megatron_amopo.data.prompts import PromptStyle, built_in_styles

DIMENSIONS = ("helpfulness", "correctness", "instruction_following")
WORDS = ("why", "how", "when", "where", "the", "a", "of", "and", "but", "question", "light", "water", "sky", "blue")


@dataclass(frozen=True)
class BenchmarkFiles:
    """Paths, and the flags by which benchmarks take them."""

    data: Path
    tokenizer: Path
    config: Path

    @property
    def data_flags(self) -> list[str]:
        return ["--data", str(self.data), "--tokenizer", str(self.tokenizer), "--cutoff-len", "512"]

    @property
    def model_flags(self) -> list[str]:
        return ["--config", str(self.config), "--parts", "2", "--repetitions", "1"]


def make_benchmark_files(folder: Path, *, records: int = 6) -> BenchmarkFiles:
    """Write them; seeded."""
    rng = random.Random(3)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(3, longest)))

    def response() -> dict[str, object]:
        scores = {name: rng.randint(0, 4) for name in DIMENSIONS}
        return {"content": text(60), **scores}

    pairs = [{"prompt": text(20), "chosen": response(), "rejected": response()} for _ in range(records)]
    files = BenchmarkFiles(folder / "pairs.jsonl", folder / "tokenizer", folder / "config.json")
    files.data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    prompts = [text for style in built_in_styles() for text in PromptStyle.load(style).texts(DIMENSIONS, [1, 2, 3])]
    save_tokenizer(train_tokenizer([*WORDS, *prompts] * 5, vocabulary=800), files.tokenizer)
    config = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 802,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1024,
    }
    files.config.write_text(json.dumps(config), encoding="utf-8")
    return files
