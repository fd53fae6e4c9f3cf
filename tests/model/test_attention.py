"""Packed attention against a dense mask written out token by token, in float64, values and gradients."""

import pytest
import torch

from megatron_amopo.certification.tiny import random_groups
from megatron_amopo.data.batching import pack
from megatron_amopo.data.segments import Branch, PackedSegments
from megatron_amopo.model.attention import (
    PackedAttention,
    per_branch_attention,
    varlen_attention,
)

HEADS, KV_HEADS, SIZE = 4, 2, 16


def packed(sharing: str, pad_to_multiple_of: int = 16):
    """The branches of three groups and the number of packed tokens."""
    groups = random_groups(3, dimensions=3, seed=6, shared_question=True)
    batch = pack(groups, torch.zeros(3, 3, 2), [True] * 3, sharing=sharing, pad_to_multiple_of=pad_to_multiple_of)
    num_tokens = batch.input_ids.shape[1]
    assert batch.segments.num_queries < num_tokens  # there is padding
    return batch.segments, num_tokens


def deeper():
    """A tree of depth four, with a branch of one token and one that looks past its neighbours."""
    ranges = [
        (),
        (range(7),),
        (range(7), range(9, 10)),
        (range(3), range(7, 9)),
        (range(7), range(9, 10), range(10, 14)),
    ]
    starts = [0, 9, 10, 15, 18, 23]
    branches = tuple(Branch(a, b, above) for a, b, above in zip(starts, starts[1:], ranges, strict=False))
    return PackedSegments(branches, torch.device("cpu")), 24


TABLES = {
    "each alone": lambda: packed("none"),
    "shared prompts": lambda: packed("responses"),
    "shared questions": lambda: packed("tree"),
    "deeper": deeper,
}


def inputs(num_tokens: int, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    shapes = [(num_tokens, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def visible(segments, num_tokens: int) -> torch.Tensor:
    """[T, T]: which token (row) sees which, by the words of the definition."""
    seen = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for branch in segments.branches:
        for query in range(branch.start, branch.end):
            for ancestor in branch.ancestors:
                seen[query, ancestor.start : ancestor.stop] = True
            seen[query, branch.start : query + 1] = True
    return seen


def dense(q, k, v, segments, scale=None):
    seen = visible(segments, q.shape[0])[: segments.num_queries].to(q.device)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhs,khs->hqk", q[: segments.num_queries], k) * (scale or SIZE**-0.5)
    return torch.einsum("hqk,khs->qhs", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("table", TABLES)
def test_per_branch_equals_dense(table, scale):
    segments, num_tokens = TABLES[table]()
    tensors = inputs(num_tokens)
    actual = per_branch_attention(*tensors, segments, scale=scale)
    expected = dense(*tensors, segments, scale)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    incoming = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad(actual, tensors, incoming), torch.autograd.grad(expected, tensors, incoming), strict=True
    )
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("table", TABLES)
def test_the_gathered_keys_are_what_a_variable_length_kernel_takes(table):
    """Queries and gathered keys cut at the offsets, causal and aligned at the bottom right: the same attention."""
    segments, num_tokens = TABLES[table]()
    q, k, v = inputs(num_tokens)
    queries, keys = segments.query_offsets.tolist(), segments.key_offsets.tolist()
    outputs = []
    for number in range(len(segments.branches)):
        own_q = q[queries[number] : queries[number + 1]]
        own_k, own_v = (x[segments.key_index][keys[number] : keys[number + 1]] for x in (k, v))
        mask = torch.ones(len(own_q), len(own_k), dtype=torch.bool).tril(len(own_k) - len(own_q))
        own_k, own_v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (own_k, own_v))
        scores = torch.einsum("qhs,khs->hqk", own_q, own_k) * SIZE**-0.5
        outputs.append(torch.einsum("hqk,khs->qhs", scores.masked_fill(~mask, float("-inf")).softmax(-1), own_v))
    torch.testing.assert_close(torch.cat(outputs), dense(q, k, v, segments), rtol=1e-10, atol=1e-12)


def test_module_takes_megatrons_layout_and_pads_with_zeros():
    segments, num_tokens = packed("tree")
    q, k, v = inputs(num_tokens)
    module = PackedAttention(None, 1, None, "self", softmax_scale=None, cp_comm_type=None, pg_collection=None)
    output = module(q[:, None], k[:, None], v[:, None], None, packed_seq_params=segments)
    assert output.shape == (num_tokens, 1, HEADS * SIZE)
    used = segments.num_queries
    torch.testing.assert_close(output[:used, 0].view(used, HEADS, SIZE), dense(q, k, v, segments))
    assert not output[used:].any()


def test_module_refuses_another_kind_of_packing():
    q, k, v = inputs(8)
    module = PackedAttention(None, 1, None, "self")
    with pytest.raises(TypeError, match="PackedSegments"):
        module(q[:, None], k[:, None], v[:, None], None, packed_seq_params=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", TABLES)
def test_varlen_equals_dense_on_cuda(table, dtype):
    device = torch.device("cuda")
    segments, num_tokens = TABLES[table]()
    segments = PackedSegments(segments.branches, device)
    tensors = inputs(num_tokens, dtype, device)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    actual, expected = varlen_attention(*tensors, segments), dense(*wide, segments)
    incoming = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3)).to(device)
    gradients = torch.autograd.grad(actual, tensors, incoming.to(dtype))
    references = torch.autograd.grad(expected, wide, incoming.double())
    for left, right in zip((actual, *gradients), (expected, *references), strict=True):
        assert (left.double() - right).norm() < 0.02 * right.norm()
