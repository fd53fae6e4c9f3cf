"""The table that says which tokens of a packed micro-batch attend to which.

A micro-batch is one row of tokens, group after group, padded at its end. A group is a tree that is laid out depth
first: the start that all prompts share, then for each dimension the rest of its prompt and its two responses, ``shared
| prompt | chosen | rejected | prompt | chosen | rejected | …``. A *branch* is a run of query tokens together with what
it may look at: its ancestors in the tree, which are ranges of earlier tokens, then itself up to the query. What
directly continues a branch belongs to it, so ``shared | prompt | chosen`` is one branch without ancestors; the second
dimension's ``prompt | chosen`` is one below ``shared``, and its ``rejected`` one below ``shared`` and that prompt; it
never sees the chosen response. Nothing here or in the attention knows how deep the tree is.

Made by ``batching.py``, read by ``model/attention.py``; in between it travels in Megatron's ``packed_seq_params``
argument.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """Query tokens ``[start, end)`` that attend to all tokens of the ranges ``ancestors`` (in the order of their
    positions, none of them empty) and, causally, to themselves.
    """

    start: int
    end: int
    ancestors: tuple[range, ...] = ()

    @property
    def num_queries(self) -> int:
        return self.end - self.start

    @property
    def prefix_length(self) -> int:
        """Keys in front of the branch's own, which is also the position of its first token."""
        return sum(map(len, self.ancestors))

    @property
    def num_keys(self) -> int:
        return self.prefix_length + self.num_queries

    @property
    def keys(self) -> tuple[range, ...]:
        """The ranges of tokens that it attends to, its own last."""
        return (*self.ancestors, range(self.start, self.end))


@dataclass(frozen=True)
class PackedSegments:
    """The branches of a micro-batch, in order and without gaps; tokens after the last branch are padding."""

    branches: tuple[Branch, ...]
    device: torch.device
    # What Megatron reads of the PackedSeqParams that it expects in this place: 'thd' would make it reshape and rotate
    # in its own way.
    qkv_format: str = field(default="packed_groups", init=False)
    cp_group: None = field(default=None, init=False)

    @property
    def num_queries(self) -> int:
        """Tokens that belong to a branch; the rest of the micro-batch is padding."""
        return self.branches[-1].end

    @cached_property
    def key_index(self) -> Tensor:
        """``[Σ keys]`` int64 token of each key, branch by branch, in the order of positions."""
        spans = [torch.arange(keys.start, keys.stop) for branch in self.branches for keys in branch.keys]
        return torch.cat(spans).to(self.device, non_blocking=True)

    @cached_property
    def query_offsets(self) -> Tensor:
        """``[branches + 1]`` int32 cumulative number of queries."""
        return self._offsets([b.num_queries for b in self.branches])

    @cached_property
    def key_offsets(self) -> Tensor:
        """``[branches + 1]`` int32 cumulative number of keys."""
        return self._offsets([b.num_keys for b in self.branches])

    def _offsets(self, counts: Sequence[int]) -> Tensor:
        return torch.tensor([0, *counts]).cumsum(0).to(self.device, torch.int32, non_blocking=True)
