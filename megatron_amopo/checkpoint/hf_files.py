"""Which files of a Hugging Face model folder count, by name: what conversions read, copy and write. Needs no torch."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from megatron_amopo.data.model_card import is_own_card
from megatron_amopo.data.model_prompts import PROMPTS_FILE

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
#: A folder in the folder.
MORE_TEMPLATES = "additional_chat_templates"

#: What travels with the weights: enough to load, tokenize and generate as the original did. Custom code doesn't.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    PROMPTS_FILE,
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
#: What a conversion reads and writes, as patterns of names.
FILES = (CONFIG, "*.safetensors", INDEX, *SIDE_FILES, MORE_TEMPLATES)


def is_of_export(path: Path) -> bool:
    """Whether a conversion could have written this file, or `tools/report.py` into what a conversion wrote."""
    return any(fnmatch(path.name, pattern) for pattern in FILES) or is_own_card(path)
