"""RMSNorm for Megatron's own layers: torch's, which Megatron's wrapper of it keeps from sequence parallelism, and on
the CPU in one autograd function.

There torch computes it operation by operation, about twenty passes over the hidden states forwards and backwards, and
keeps their products. Here a few rows at a time are normalised, and beside the input only one number per row is kept.

Of a row x of H numbers, with weight w and r = 1/√(mean(x²) + ε), y = w·r·x; of the gradient g of y,

    ∂w = Σ_rows r·g·x        ∂x = r·w·g − x·(r³/H)·Σ w·g·x
"""

from typing import Any

import torch
from torch import Tensor

from megatron_amopo.model.tiles import row_tiles


class RMSNorm(torch.nn.RMSNorm):
    """Norm module of Megatron's layers, which tells Megatron to sum its weight's gradient over sequence-parallel
    ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[…, H]`` to the same; statistics in float32, in float64 for such inputs."""
        if x.device.type != "cpu":
            return super().forward(x)
        return _RMSNorm.apply(x.flatten(0, -2), self.weight, self.eps).reshape(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_weight, size = weight.to(wide), x.shape[1]
        y, scale = torch.empty_like(x), x.new_empty(x.shape[0], dtype=wide)
        for rows in row_tiles(x):
            own = x[rows].to(wide)
            mean_square = torch.linalg.vector_norm(own, dim=-1).square_().div_(size)
            scale[rows] = mean_square.add_(eps).rsqrt_()
            y[rows] = torch.mul(own, scale[rows, None]).mul_(wide_weight)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide_weight, size = weight.to(scale.dtype), x.shape[1]
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(wide_weight)
        for rows in row_tiles(x):
            own, grad, r = x[rows].to(scale.dtype), grad_outputs[0][rows].to(scale.dtype), scale[rows]
            product = grad * own
            grad_weight.addmv_(product.t(), r)
            along_x = torch.mv(product, wide_weight).mul_(r.pow(3)).div_(size)
            torch.mul(grad, wide_weight, out=product).mul_(r[:, None]).addcmul_(own, along_x[:, None], value=-1)
            grad_x[rows] = product
        return grad_x, grad_weight.to(weight.dtype), None
