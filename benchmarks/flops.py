"""How many floating-point operations a training step takes: what the two ways of computing it differ by before any
kernel runs.

A multiplication and an addition count as two. The backward pass of a matrix product takes twice its forward pass.

    layers     6 · tokens · weights of the layers' matrix products
    attention  3 · 4 · layers · heads · head size · pairs, pairs = Σ over queries of the keys that they see
    head       2 · p · rows · weights of the output layer, with p = 3 passes, or 4 where the logits are computed again

Attention counts causal pairs only, whatever a kernel computes and throws away. Everything elementwise, norms, softmax,
the embedding's lookup, counts as nothing: it is bound by memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.models import ModelSlice
from benchmarks.released import PaddedRows

STORED_LOGITS, RECOMPUTED_LOGITS = 3, 4


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of forward and backward pass."""

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


def packed_flops(model: ModelSlice, batches: Iterable[Any]) -> StepFlops:
    """Of packed micro-batches (:class:`GroupBatch`), response rows through the head, logits recomputed."""
    tokens = pairs = rows = 0
    for batch in batches:
        tokens += batch.num_tokens
        rows += len(batch.targets)
        for branch in batch.segments.branches:
            pairs += branch.num_queries * branch.prefix_length + _causal_pairs(branch.num_queries)
    return _flops(model, tokens, pairs, rows, RECOMPUTED_LOGITS)


def padded_flops(model: ModelSlice, batches: Iterable[PaddedRows]) -> StepFlops:
    """Of padded micro-batches, all of whose tokens go through the head."""
    tokens = pairs = 0
    for batch in batches:
        num_rows, length = batch.input_ids.shape
        tokens += num_rows * length
        pairs += num_rows * _causal_pairs(length)
    return _flops(model, tokens, pairs, tokens, STORED_LOGITS)


def _flops(model: ModelSlice, tokens: int, pairs: int, head_rows: int, head_passes: int) -> StepFlops:
    config = model.config
    # Heads × head size is the hidden size.
    per_pair = 4 * config["num_hidden_layers"] * config["hidden_size"]
    return StepFlops(
        layers=6.0 * tokens * model.layer_parameters,
        attention=3.0 * per_pair * pairs,
        head=2.0 * head_passes * head_rows * model.head_parameters,
    )


def _causal_pairs(length: int) -> int:
    return length * (length + 1) // 2
