"""Packed attention against a dense mask written out token by token, in float64, values and gradients."""

import functools
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_amopo.certification.tiny import random_groups
from megatron_amopo.data.batching import pack
from megatron_amopo.data.segments import Branch, PackedSegments
from megatron_amopo.errors import ConfigError
from megatron_amopo.model.attention import (
    PackedAttention,
    flash3_attention,
    per_branch_attention,
    select_backend,
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


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, deterministic
):
    """FlashAttention-3's by its documentation: fewer KV heads, causal at the bottom right, lengths that bound."""
    assert (causal, deterministic) == (True, False)
    return by_offsets(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, enable_gqa=True)


def by_offsets(q, k, v, cu_q, cu_k, max_q, max_k, scale, *, enable_gqa):
    """What variable-length kernels compute of the pieces between offsets, causal at the bottom right."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
    outputs = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(int(d - c - (b - a)))
        heads_first = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        attended = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("gives_log_sum_exp", [False, True])
def test_flash3_is_called_as_documented(monkeypatch, gives_log_sum_exp):
    """On a stand-in, because the library is built for GPUs."""

    def function(*args, **options):
        attended = flash_attn_varlen_func(*args, **options)
        return (attended, None) if gives_log_sum_exp else attended

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_varlen_func=function))
    segments, num_tokens = packed("tree")
    tensors = inputs(num_tokens)
    torch.testing.assert_close(flash3_attention(*tensors, segments, scale=0.3), dense(*tensors, segments, 0.3))


def varlen_attn_with_is_causal(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None, *, scale=None):
    assert is_causal is True
    return varlen_of_equal_heads(q, k, v, cu_q, cu_k, max_q, max_k, scale)


def varlen_attn_with_window(
    q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), seqused_k=None
):
    assert window_size == (-1, 0)
    return varlen_of_equal_heads(q, k, v, cu_q, cu_k, max_q, max_k, scale)


def varlen_attn_with_gqa(
    q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    # One tensor for both would be attention of equal lengths, its mask aligned at the top left.
    assert cu_q is not cu_k
    assert k.shape[1] == v.shape[1] <= q.shape[1]
    return by_offsets(q, k, v, cu_q, cu_k, max_q, max_k, scale, enable_gqa=enable_gqa)


def varlen_of_equal_heads(q, k, v, *rest):
    assert q.shape[1] == k.shape[1] == v.shape[1]
    return by_offsets(q, k, v, *rest, enable_gqa=False)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
@pytest.mark.parametrize(
    "stand_in", [varlen_attn_with_is_causal, varlen_attn_with_window, varlen_attn_with_gqa], ids=lambda f: f.__name__
)
def test_varlen_is_called_as_its_signature_says(monkeypatch, stand_in, kv_heads, table):
    """torch's function in its three signatures, oldest first, on stand-ins, because it has no CPU kernel; values and
    gradients equal the reference backend's.
    """
    calls = []

    @functools.wraps(stand_in)  # its signature, too
    def recorded(*args, **options):
        calls.append(options["scale"])
        return stand_in(*args, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", recorded)
    segments, num_tokens = TABLES[table]()
    q, k, v = inputs(num_tokens)
    if kv_heads != KV_HEADS:
        k, v = (torch.cat([x, 0.5 * x.flip(0)], dim=1).detach().requires_grad_() for x in (k, v))
    for scale in (None, 0.3):
        actual, expected = (
            backend(q, k, v, segments, scale=scale) for backend in (varlen_attention, per_branch_attention)
        )
        incoming = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        gradients, references = (torch.autograd.grad(x, (q, k, v), incoming) for x in (actual, expected))
        for left, right in zip((actual, *gradients), (expected, *references), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
    assert calls == [None, 0.3]


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "has_flash3", "chosen"),
    [
        ("cpu", torch.bfloat16, None, True, per_branch_attention),
        ("cuda", torch.float32, (9, 0), True, per_branch_attention),
        ("cuda", torch.bfloat16, (8, 0), True, varlen_attention),
        ("cuda", torch.bfloat16, (9, 0), False, varlen_attention),
        ("cuda", torch.float16, (9, 0), True, flash3_attention),
        ("cuda", torch.bfloat16, (10, 0), True, varlen_attention),
    ],
)
def test_which_backend_runs_where(monkeypatch, device, dtype, capability, has_flash3, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: has_flash3 or None)
    select = select_backend.__wrapped__  # what it says of this machine stays out of the cache
    assert select("auto", torch.device(device), dtype) is chosen
    assert select("sdpa", torch.device(device), dtype) is per_branch_attention


def test_a_backend_that_can_not_run_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="--amopo-attention varlen needs CUDA and --bf16; it would run on cpu"):
        select_backend("varlen", torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ConfigError, match="unknown attention backend 'flash'"):
        select_backend("flash", torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ConfigError, match="--amopo-attention fa3 needs a Hopper GPU"):
        select_backend("fa3", torch.device("cuda"), torch.bfloat16)


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
@pytest.mark.parametrize("name", ["varlen", "fa3"])
def test_kernels_equal_dense_on_cuda(name, table, dtype):
    device = torch.device("cuda")
    try:
        backend = select_backend(name, device, dtype)
    except ConfigError as missing:
        if name != "fa3":  # the one that torch doesn't bring
            raise
        pytest.skip(str(missing))
    segments, num_tokens = TABLES[table]()
    segments = PackedSegments(segments.branches, device)
    tensors = inputs(num_tokens, dtype, device)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    actual, expected = backend(*tensors, segments), dense(*wide, segments)
    incoming = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3)).to(device)
    gradients = torch.autograd.grad(actual, tensors, incoming.to(dtype))
    references = torch.autograd.grad(expected, wide, incoming.double())
    for left, right in zip((actual, *gradients), (expected, *references), strict=True):
        assert (left.double() - right).norm() < 0.02 * right.norm()
