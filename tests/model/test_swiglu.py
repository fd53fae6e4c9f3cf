"""The fused SwiGLU against Megatron's unfused formula, value and gradient, to the last bit."""

import pytest
import torch
import torch.nn.functional as F

from megatron_amopo.model import tiles
from megatron_amopo.model.swiglu import SwiGLU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_unfused_formula(dtype):
    gate_up = torch.randn(7, 1, 38, dtype=dtype, requires_grad=True)
    own = gate_up.detach().clone().requires_grad_()
    incoming = torch.randn(7, 1, 19, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    actual = SwiGLU(config=None)(own)
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(actual, own, incoming)
    assert torch.equal(gradient, torch.autograd.grad(expected, gate_up, incoming)[0])


def test_many_tiles_are_one(monkeypatch):
    gate_up, incoming = torch.randn(50, 38), torch.randn(50, 19)

    def run():
        own = gate_up.clone().requires_grad_()
        result = SwiGLU(config=None)(own)
        return result, *torch.autograd.grad(result, own, incoming)

    at_once = run()
    monkeypatch.setattr(tiles, "_CPU_TILE", 38 * 7 // torch.get_num_threads())
    assert all(map(torch.equal, run(), at_once))


def test_gradient_is_written_over_the_input_and_only_once():
    gate_up = torch.randn(3, 8, requires_grad=True)
    made = gate_up * 2
    result = SwiGLU(config=None)(made)
    (gradient,) = torch.autograd.grad(result.sum(), made, retain_graph=True)
    assert gradient.data_ptr() == made.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.sum(), made)


def test_keeps_only_its_input():
    gate_up = torch.randn(5, 8, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        SwiGLU(config=None)(gate_up)
    assert [tensor.data_ptr() for tensor in kept] == [gate_up.data_ptr()]
