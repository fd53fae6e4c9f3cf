"""The sizes of a model that memory and time depend on, and how many parameters each rank of a layout holds.

Takes the Megatron arguments that ``checkpoint/families.py`` reads from a ``config.json``; gives plain numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_amopo.planning.layout import Layout

#: Of Megatron's --make-vocab-size-divisible-by.
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Linear:
    """A layer's matrix product: ``outputs`` × ``inputs`` weights, of which tensor parallelism splits one side."""

    name: str
    outputs: int
    inputs: int
    splits_outputs: bool  # column-parallel; otherwise row-parallel

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs

    def on_rank(self, tp: int) -> tuple[int, int]:
        """(outputs, inputs) on one of ``tp`` ranks."""
        return (self.outputs // tp, self.inputs) if self.splits_outputs else (self.outputs, self.inputs // tp)


@dataclass(frozen=True)
class ModelSizes:
    """A decoder of Llama's kind: grouped-query attention, SwiGLU, RMSNorm."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "ModelSizes":
        """Of :func:`megatron_amopo.checkpoint.families.megatron_arguments`."""
        return cls(
            layers=arguments["num_layers"],
            hidden=arguments["hidden_size"],
            ffn=arguments["ffn_hidden_size"],
            heads=arguments["num_attention_heads"],
            kv_heads=arguments["num_query_groups"],
            head_size=arguments["kv_channels"],
            vocabulary=arguments["vocab_size"],
            tied=not arguments["untie_embeddings_and_output_weights"],
            qkv_bias=arguments["add_qkv_bias"],
            qk_norm=arguments["qk_layernorm"],
        )

    @property
    def query(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_size

    @property
    def key_value(self) -> int:
        """Channels of all key heads and all value heads."""
        return 2 * self.kv_heads * self.head_size

    def gathered_key_value(self, layout: Layout) -> int:
        """Key and value channels that attention reads on one rank. Context parallelism trades tokens for heads; where
        its ranks don't divide the key-value heads, each of these is on several (``model/context_parallel.py``)."""
        heads = self.kv_heads // layout.tp
        return 2 * self.head_size * (heads // math.gcd(heads, layout.cp))

    @property
    def attention_linears(self) -> tuple[Linear, Linear]:
        return (
            Linear("linear_qkv", self.query + self.key_value, self.hidden, True),
            Linear("linear_proj", self.hidden, self.query, False),
        )

    @property
    def mlp_linears(self) -> tuple[Linear, Linear]:
        return (
            Linear("linear_fc1", 2 * self.ffn, self.hidden, True),
            Linear("linear_fc2", self.hidden, self.ffn, False),
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.attention_linears + self.mlp_linears

    @property
    def layer_linear_weights(self) -> int:
        """Weights of one layer's matrix products."""
        return sum(linear.weights for linear in self.linears)

    def padded_vocabulary(self, tp: int) -> int:
        """Rows of the embedding over all ranks, as Megatron pads them."""
        multiple = VOCABULARY_MULTIPLE * tp
        return math.ceil(self.vocabulary / multiple) * multiple

    def layer_parameters(self, tp: int = 1) -> int:
        """Parameters of one layer on one of ``tp`` ranks: norms are on every rank, the rest is split."""
        bias = (self.query + self.key_value) // tp if self.qkv_bias else 0
        norms = 2 * self.hidden + (2 * self.head_size if self.qk_norm else 0)
        return self.layer_linear_weights // tp + bias + norms

    def stage_layers(self, stage: int, layout: Layout) -> int:
        """Layers of pipeline stage ``stage`` (from 0)."""
        if not layout.count_ends:
            return self.layers // layout.pp
        return (self.layers + 2) // layout.pp - (stage == 0) - (stage == layout.pp - 1)

    def stage_parameters(self, stage: int, layout: Layout) -> int:
        """Parameters of one rank of pipeline stage ``stage`` (from 0), its padded vocabulary rows included."""
        tp = layout.tp
        vocabulary = self.padded_vocabulary(tp) // tp * self.hidden
        is_first, is_last = stage == 0, stage == layout.pp - 1
        parameters = self.stage_layers(stage, layout) * self.layer_parameters(tp)
        if is_first:
            parameters += vocabulary
        if is_last:
            # Tied, the last stage of several has a copy of the embedding.
            parameters += self.hidden + (0 if self.tied and is_first else vocabulary)
        return parameters

    @property
    def parameters(self) -> int:
        """Of the whole model, without padding."""
        vocabulary = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters() + self.hidden + vocabulary
