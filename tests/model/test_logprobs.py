"""The fused head without ranks: low precision, memory, refusals. Values against float64 are in
``tests/distributed``.
"""

import re

import pytest
import torch

from megatron_amopo.errors import ConfigError
from megatron_amopo.model import response_logps


def inputs(rows=50, hidden=32, vocab=200, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_(),
        (torch.randn(vocab, hidden, generator=generator) / 4).to(dtype).requires_grad_(),
        torch.randint(0, vocab, (rows,), generator=generator),
    )


def test_bfloat16_has_float32_statistics():
    hidden, weight, targets = inputs(dtype=torch.bfloat16)
    result = response_logps(hidden, weight, targets, chunk_rows=16)
    assert result.dtype == torch.float32
    logits = (hidden @ weight.t()).double()
    torch.testing.assert_close(
        result.double(), logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6
    )

    incoming = torch.linspace(-1, 3, len(targets))
    gradients = torch.autograd.grad(result, (hidden, weight), incoming)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    plain = (wide[0] @ wide[1].t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for actual, expected in zip(gradients, torch.autograd.grad(plain, wide, incoming.double()), strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual.double() - expected).norm() < 0.02 * expected.norm()


def test_weight_gradient_does_not_depend_on_the_chunks():
    hidden, weight, targets = inputs(rows=300, dtype=torch.bfloat16)
    gradients = [
        torch.autograd.grad(response_logps(hidden, weight, targets, chunk_rows=c).sum(), weight)[0] for c in (7, 300)
    ]
    assert (gradients[0].double() - gradients[1].double()).norm() < 0.004 * gradients[1].double().norm()


def test_keeps_nothing_of_size_rows_by_vocabulary():
    hidden, weight, targets = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        response_logps(hidden, weight, targets)
    assert saved
    assert max(saved) <= max(hidden.numel(), weight.numel())


def test_extreme_logits_stay_finite():
    hidden, weight, targets = inputs()
    result = response_logps(hidden * 1e4, weight, targets)
    assert torch.isfinite(result).all()
    assert torch.isfinite(torch.autograd.grad(result.sum(), weight)[0]).all()


def test_no_rows():
    hidden, weight, targets = inputs()
    result = response_logps(hidden[:0], weight, targets[:0])
    assert result.shape == (0,)
    assert not torch.autograd.grad(result.sum(), weight)[0].any()


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = inputs()
    result = response_logps(hidden.detach(), weight, targets)
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    assert gradient.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"vocab_size": 201}, "vocab_size 201 is not in 1 … 200"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"targets": torch.zeros(49, dtype=torch.int64)}, "don't fit"),
        ({"weight": torch.zeros(200, 31)}, "don't fit"),
    ],
)
def test_refusals(change, message):
    hidden, weight, targets = inputs()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(ConfigError, match=re.escape(message)):
        response_logps(**arguments)
