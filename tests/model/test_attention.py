"""Packed attention against a dense mask written out token by token, in float64, values and gradients."""

import pytest
import torch

from megatron_amopo.certification.tiny import random_groups
from megatron_amopo.data.batching import pack
from megatron_amopo.model.attention import (
    PackedAttention,
    per_branch_attention,
    varlen_attention,
)

HEADS, KV_HEADS, SIZE = 4, 2, 16


def batch_of(groups: int = 3, pad_to_multiple_of: int = 16):
    batch = pack(random_groups(groups, dimensions=2, seed=6), torch.zeros(groups, 2, 2), [True] * groups,
                 pad_to_multiple_of=pad_to_multiple_of)  # fmt: skip
    assert batch.segments.num_queries < batch.input_ids.shape[1]  # there is padding
    return batch


def inputs(num_tokens: int, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    shapes = [(num_tokens, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def visible(segments, num_tokens: int) -> torch.Tensor:
    """[T, T]: which token (row) sees which, by the words of the definition."""
    seen = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for branch in segments.branches:
        for query in range(branch.start, branch.end):
            seen[query, branch.prefix_start : branch.prefix_end] = True
            seen[query, branch.start : query + 1] = True
    return seen


def dense(q, k, v, segments, scale=None):
    seen = visible(segments, q.shape[0])[: segments.num_queries].to(q.device)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhs,khs->hqk", q[: segments.num_queries], k) * (scale or SIZE**-0.5)
    return torch.einsum("hqk,khs->qhs", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_per_branch_equals_dense(scale):
    batch = batch_of()
    tensors = inputs(batch.input_ids.shape[1])
    actual = per_branch_attention(*tensors, batch.segments, scale=scale)
    expected = dense(*tensors, batch.segments, scale)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    incoming = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad(actual, tensors, incoming), torch.autograd.grad(expected, tensors, incoming), strict=True
    )
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_module_takes_megatrons_layout_and_pads_with_zeros():
    batch = batch_of()
    num_tokens = batch.input_ids.shape[1]
    q, k, v = inputs(num_tokens)
    module = PackedAttention(None, 1, None, "self", softmax_scale=None, cp_comm_type=None, pg_collection=None)
    output = module(q[:, None], k[:, None], v[:, None], None, packed_seq_params=batch.segments)
    assert output.shape == (num_tokens, 1, HEADS * SIZE)
    used = batch.segments.num_queries
    torch.testing.assert_close(output[:used, 0].view(used, HEADS, SIZE), dense(q, k, v, batch.segments))
    assert not output[used:].any()


def test_module_refuses_another_kind_of_packing():
    q, k, v = inputs(8)
    module = PackedAttention(None, 1, None, "self")
    with pytest.raises(TypeError, match="PackedSegments"):
        module(q[:, None], k[:, None], v[:, None], None, packed_seq_params=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_equals_dense_on_cuda(dtype):
    device = torch.device("cuda")
    batch = batch_of().to(device)
    tensors = inputs(batch.input_ids.shape[1], dtype, device)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    actual, expected = varlen_attention(*tensors, batch.segments), dense(*wide, batch.segments)
    incoming = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3)).to(device)
    gradients = torch.autograd.grad(actual, tensors, incoming.to(dtype))
    references = torch.autograd.grad(expected, wide, incoming.double())
    for left, right in zip((actual, *gradients), (expected, *references), strict=True):
        assert (left.double() - right).norm() < 0.02 * right.norm()
