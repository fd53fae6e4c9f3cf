"""The table that says which tokens of a packed micro-batch attend to which.

A micro-batch is one row of tokens, ``prompt | chosen | rejected | prompt | chosen | rejected | … | padding``. A
*branch* is a run of query tokens together with what it may look at: its prefix, then itself up to the query. ``prompt |
chosen`` is one branch without a prefix; ``rejected`` is a branch whose prefix is the prompt, so that it never sees the
chosen response.

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
    """Query tokens ``[start, end)`` that attend to tokens ``[prefix_start, prefix_end)`` and, causally, to
    themselves.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def num_queries(self) -> int:
        return self.end - self.start

    @property
    def prefix_length(self) -> int:
        return self.prefix_end - self.prefix_start

    @property
    def num_keys(self) -> int:
        return self.prefix_length + self.num_queries


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
        """``[Σ keys]`` int64 token of each key, branch by branch, prefix first."""
        spans = [span for b in self.branches for span in ((b.prefix_start, b.prefix_end), (b.start, b.end))]
        return torch.cat([torch.arange(*span) for span in spans]).to(self.device, non_blocking=True)

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
