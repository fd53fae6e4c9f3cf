"""SwiGLU for Megatron's own layers: silu(gate) · up in one autograd function that keeps nothing but its input.

Megatron's unfused layers compute it operation by operation. That keeps three tensors of the MLP's width, and on the way
back makes four more and copies two of them into one: on a CPU, where the operating system must hand out that memory, it
takes longer than the arithmetic. Megatron's fused form needs torch's compiler, without which it is slower still. Here
a few rows at a time go through the operations of the unfused form: results are the same to the last bit. The gradient
is written over the input, which nothing else needs by then (the layer before keeps its own input, not its output);
going back a second time is an error that autograd reports.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amopo.model.tiles import row_tiles


class SwiGLU(torch.nn.Module):
    """Activation module of Megatron's MLP; ``config`` is what Megatron hands to all of them."""

    def __init__(self, *, config: Any):
        super().__init__()

    def forward(self, input_: Tensor) -> Tensor:
        """``[…, 2 · width]``, gates before what they are for, to ``[…, width]``."""
        return _SwiGLU.apply(input_.flatten(0, -2)).unflatten(0, input_.shape[:-1])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        result = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        for rows in row_tiles(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=result[rows]).mul_(up)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        for rows in row_tiles(gate_up):
            grad = grad_outputs[0][rows]
            gate, up = gate_up[rows].chunk(2, dim=-1)
            grad_up = F.silu(gate).mul_(grad)
            torch.ops.aten.silu_backward.grad_input(up.mul_(grad), gate, grad_input=gate)
            up.copy_(grad_up)
        return gate_up
