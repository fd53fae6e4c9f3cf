"""The fused SwiGLU against Megatron's unfused formula, value and gradient, to the last bit."""

import pytest
import torch
import torch.nn.functional as F

from megatron_amopo.model.swiglu import SwiGLU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_unfused_formula(dtype):
    gate_up = torch.randn(7, 1, 38, dtype=dtype, requires_grad=True)
    incoming = torch.randn(7, 1, 19, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    actual = SwiGLU(config=None)(gate_up)
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(actual, gate_up, incoming)
    assert torch.equal(gradient, torch.autograd.grad(expected, gate_up, incoming)[0])


def test_gradient_by_finite_differences():
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU(config=None), gate_up)


def test_keeps_only_its_input():
    gate_up = torch.randn(5, 8, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        SwiGLU(config=None)(gate_up)
    assert [tensor.data_ptr() for tensor in kept] == [gate_up.data_ptr()]
