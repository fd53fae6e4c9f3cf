"""Attention over packed groups in which the two responses of a pair share their prompt.

:class:`PackedAttention` takes the place of a Megatron layer's core attention. It takes query, key and value of one
packed row of tokens and the table of its branches (``data/segments.py``) and gives the attended values. The causal mask
of a branch is aligned at the bottom right: its last query sees all of its keys. Positions are
``rotary.py``'s business.

Shapes: T tokens of the micro-batch, padding included; heads as Megatron splits them over tensor parallelism.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amopo.data.segments import PackedSegments


class PackedAttention(torch.nn.Module):
    """Core attention of a Megatron layer over :class:`PackedSegments`; takes and gives Megatron's ``[T, 1, heads, head
    size]``.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__()
        self.softmax_scale = softmax_scale

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
        """``query [T, 1, heads, size]``, ``key`` and ``value [T, 1, KV heads, size]`` to ``[T, 1, heads · size]``;
        padding gives zeros.
        """
        segments = packed_seq_params
        if not isinstance(segments, PackedSegments):
            raise TypeError(f"PackedAttention needs PackedSegments in packed_seq_params, got {type(segments).__name__}")
        q, k, v = query[:, 0], key[:, 0], value[:, 0]
        # The variable-length kernels are FlashAttention's: half precision only.
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            context = varlen_attention(q, k, v, segments, scale=self.softmax_scale)
        else:
            context = per_branch_attention(q, k, v, segments, scale=self.softmax_scale)
        padding = query.shape[0] - segments.num_queries
        return F.pad(context, (0, 0, 0, 0, 0, padding)).flatten(1)[:, None]


def per_branch_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, *, scale: float | None = None
) -> Tensor:
    """The reference, on any device: one ``scaled_dot_product_attention`` per branch. ``[T, heads, size]`` to
    ``[queries, heads, size]``.
    """
    outputs = []
    for branch in segments.branches:
        own = slice(branch.start, branch.end)
        keys, values, mask = k[own], v[own], None
        if branch.prefix_length:
            prefix = slice(branch.prefix_start, branch.prefix_end)
            keys, values = torch.cat([k[prefix], keys]), torch.cat([v[prefix], values])
            mask = torch.ones(branch.num_queries, branch.num_keys, dtype=torch.bool, device=q.device).tril(
                branch.prefix_length
            )
        attended = F.scaled_dot_product_attention(
            q[own].transpose(0, 1)[None],
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
    """All branches in one variable-length call (CUDA, half precision). Shapes as :func:`per_branch_attention`."""
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
