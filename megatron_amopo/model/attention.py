"""Attention over packed groups in which the two responses of a pair share their prompt.

:class:`PackedAttention` takes the place of a Megatron layer's core attention. It takes query, key and value of one
packed row of tokens and the table of its branches (``data/segments.py``) and gives the attended values. The causal mask
of a branch is aligned at the bottom right: its last query sees all of its keys. Positions are ``rotary.py``'s business,
tokens that lie on other ranks ``context_parallel.py``'s.

What computes it is a *backend*, a function ``(q, k, v, segments, scale=…) -> context`` of :data:`BACKENDS`;
:func:`select_backend` says which one runs where.

Shapes: T tokens of the micro-batch, padding included; t of them on this context-parallel rank, T without context
parallelism; heads as Megatron splits them over tensor parallelism.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amopo.data.segments import PackedSegments
from megatron_amopo.errors import ConfigError
from megatron_amopo.model.context_parallel import shard_heads, shard_tokens

AUTO = "auto"
_FLASH3 = "flash_attn_interface"  # FlashAttention-3's module


class AttentionBackend(Protocol):
    """``q [T, heads, size]``, ``k`` and ``v [T, KV heads, size]`` to ``[queries, heads, size]``, padding left out."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, *, scale: float | None = None
    ) -> Tensor: ...


class PackedAttention(torch.nn.Module):
    """Core attention of a Megatron layer over :class:`PackedSegments`; takes and gives Megatron's ``[t, 1, heads, head
    size]``.

    Args:
        softmax_scale: of the scores; None is 1/√(head size).
        pg_collection: Megatron's process groups, of which ``cp`` is used; None stands for no context parallelism.
        backend: a name of :data:`BACKENDS`, or ``auto``.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        backend: str = AUTO,
        **_: Any,
    ):
        super().__init__()
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if pg_collection is not None and pg_collection.cp.size() > 1 else None
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: PackedSegments | None = None,
        **_: Any,
    ) -> Tensor:
        """``query [t, 1, heads, size]``, ``key`` and ``value [t, 1, KV heads, size]`` to ``[t, 1, heads · size]``;
        padding gives zeros.
        """
        segments = packed_seq_params
        if not isinstance(segments, PackedSegments):
            raise TypeError(f"PackedAttention needs PackedSegments in packed_seq_params, got {type(segments).__name__}")
        # Views on the way back, too: the gradient of an index is a tensor of zeros and a copy.
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if self.cp_group is not None:
            q, k, v = shard_heads(q, k, v, self.cp_group)
        context = select_backend(self.backend, q.device, q.dtype)(q, k, v, segments, scale=self.softmax_scale)
        if padding := q.shape[0] - segments.num_queries:
            context = F.pad(context, (0, 0, 0, 0, 0, padding))
        if self.cp_group is not None:
            context = shard_tokens(context, self.cp_group)
        return context.flatten(1)[:, None]


def per_branch_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, *, scale: float | None = None
) -> Tensor:
    """The reference, on any device in any dtype: one ``scaled_dot_product_attention`` per branch.

    Queries, keys and values are cut into pieces once: the gradient of one slice after the other would be as many
    tensors of zeros of the whole length, added up.
    """
    queries = q[: segments.num_queries].split([branch.num_queries for branch in segments.branches])
    edges = sorted({0, *(edge for b in segments.branches for span in b.keys for edge in (span.start, span.stop))})
    lengths = [stop - start for start, stop in pairwise(edges)]
    kv_pieces = list(zip(edges, *(x[: segments.num_queries].split(lengths) for x in (k, v)), strict=False))
    outputs = []
    for branch, own in zip(segments.branches, queries, strict=True):
        seen = [(key, value) for span in branch.keys for start, key, value in kv_pieces if start in span]
        keys, values = (torch.cat(pieces) for pieces in zip(*seen, strict=True))
        mask = None
        if branch.ancestors:
            mask = torch.ones(branch.num_queries, branch.num_keys, dtype=torch.bool, device=q.device).tril(
                branch.prefix_length
            )
        attended = F.scaled_dot_product_attention(
            own.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, *, scale: float | None = None
) -> Tensor:
    """All branches in one call of torch's variable-length kernel (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 to 2.15 spell the causal mask in two ways, and only the newer ones take fewer KV heads than query
    # heads.
    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    # The two offsets differ, as objects, too: that is how torch 2.15 knows to align the causal mask at the bottom
    # right.
    attended = varlen_attn(
        q[: segments.num_queries],
        k[segments.key_index],
        v[segments.key_index],
        segments.query_offsets,
        segments.key_offsets,
        max(b.num_queries for b in segments.branches),
        max(b.num_keys for b in segments.branches),
        scale=scale,
        **options,
    )
    assert isinstance(attended, Tensor)  # a tuple only when more was asked for
    return attended


def flash3_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, *, scale: float | None = None
) -> Tensor:
    """All branches in one call of FlashAttention-3, where it is installed (Hopper, half precision)."""
    # By its name, because no package of that name can be required: it is built from source.
    attended = importlib.import_module(_FLASH3).flash_attn_varlen_func(
        q[: segments.num_queries],
        k[segments.key_index],
        v[segments.key_index],
        cu_seqlens_q=segments.query_offsets,
        cu_seqlens_k=segments.key_offsets,
        max_seqlen_q=max(b.num_queries for b in segments.branches),
        max_seqlen_k=max(b.num_keys for b in segments.branches),
        softmax_scale=scale,
        causal=True,  # aligned at the bottom right
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # Releases before September 2025 give the log-sum-exp, too.
    return attended[0] if isinstance(attended, tuple) else attended


#: By the name that ``--amopo-attention`` has for each.
BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType(
    {"sdpa": per_branch_attention, "varlen": varlen_attention, "fa3": flash3_attention}
)


@cache
def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend that runs on this device in this dtype.

    ``auto``: FlashAttention-3 on Hopper where it is installed, else torch's variable-length kernel; both are of half
    precision, so float32 takes the reference, as does the CPU.

    Raises:
        ConfigError: a backend asked for by name that can't run here.
    """
    has_kernels = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    is_hopper = has_kernels and torch.cuda.get_device_capability(device)[0] == 9
    has_flash3 = is_hopper and importlib.util.find_spec(_FLASH3) is not None
    if name == AUTO:
        name = ("fa3" if has_flash3 else "varlen") if has_kernels else "sdpa"
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend '{name}'; known: {AUTO}, {', '.join(BACKENDS)}")
    if name != "sdpa" and not has_kernels:
        raise ConfigError(f"--amopo-attention {name} needs CUDA and --bf16; it would run on {device.type} in {dtype}")
    if name == "fa3" and not has_flash3:
        raise ConfigError("--amopo-attention fa3 needs a Hopper GPU and FlashAttention-3 (its flash_attn_interface)")
    return BACKENDS[name]
