"""Models and questions that the planner's tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_amopo.checkpoint.families import SequenceLimit
from megatron_amopo.planning.hardware import gpu
from megatron_amopo.planning.layout import Options
from megatron_amopo.planning.planner import Question
from megatron_amopo.planning.sizes import ModelSizes
from megatron_amopo.planning.work import stated_records

#: Qwen2.5 as its config.json files state it.
QWEN_7B = ModelSizes(28, 3584, 18944, 28, 4, 128, 152_064, tied=False, qkv_bias=True)
QWEN_32B = ModelSizes(64, 5120, 27648, 40, 8, 128, 152_064, tied=False, qkv_bias=True)


def question(sizes: ModelSizes = QWEN_7B, *, gpus: int = 8, **changes: Any) -> Question:
    """A run on H100s with short pairs; ``changes`` are fields of the question or of its options."""
    options = Options(global_batch=64)
    of_options = {name: changes.pop(name) for name in list(changes) if hasattr(options, name)}
    asked = Question(
        sizes=sizes,
        limit=SequenceLimit(32_768, "max_position_embeddings"),
        records=stated_records(dimensions=3, prompt_tokens=400, response_tokens=300),
        longest_sequence=700,
        gpu=gpu("h100"),
        gpus=gpus,
        options=replace(options, **of_options),
    )
    return replace(asked, **changes)
