"""The optimizers of a certificate, each written twice: as flags of Megatron's, and by hand in plain torch.

Only what the certificate needs: constant learning rate, no weight decay, no momentum for SGD.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Norm to which gradients are clipped; low enough that it takes effect.
MAX_GRAD_NORM = 0.5
# Added to the norm before dividing by it, in Megatron as in torch.
_CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class Optimizer:
    """SGD where ``betas`` is None, else Adam (Kingma and Ba, 2015, algorithm 1)."""

    learning_rate: float
    betas: tuple[float, float] | None = None
    epsilon: float = 0.0

    @property
    def flags(self) -> list[str]:
        """For Megatron, clipping included."""
        common = ["--lr", str(self.learning_rate), "--lr-decay-style", "constant", "--weight-decay", "0"]
        common += ["--clip-grad", str(MAX_GRAD_NORM)]
        if self.betas is None:
            return ["--optimizer", "sgd", "--sgd-momentum", "0", *common]
        beta1, beta2 = map(str, self.betas)
        adam = ["--optimizer", "adam", "--adam-beta1", beta1, "--adam-beta2", beta2, "--adam-eps", str(self.epsilon)]
        return adam + common


SGD = Optimizer(0.05)
ADAM = Optimizer(1e-3, (0.9, 0.999), 1e-8)
#: The distributed optimizer knows no SGD. Adam without momentum and with an epsilon far above any gradient is SGD of
#: rate learning rate / epsilon.
SGD_BY_ADAM = Optimizer(50.0, (0.0, 0.999), 1e3)


@dataclass
class PlainOptimizer:
    """The same by hand, on tensors by name."""

    optimizer: Optimizer
    weights: dict[str, Tensor]  # changed in place

    def __post_init__(self) -> None:
        self._steps = 0
        self._mean = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self._square = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def step(self, gradients: dict[str, Tensor]) -> None:
        """Clip by the norm over all gradients, then update."""
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        scale = (MAX_GRAD_NORM / (norm + _CLIP_EPSILON)).clamp(max=1.0)
        self._steps += 1
        for name, weight in self.weights.items():
            weight -= self.optimizer.learning_rate * self._direction(name, gradients[name] * scale)

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        if self.optimizer.betas is None:
            return gradient
        beta1, beta2 = self.optimizer.betas
        mean = self._mean[name].mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = self._square[name].mul_(beta2).add_(gradient.square(), alpha=1 - beta2)
        unbiased = (square / (1 - beta2**self._steps)).sqrt()
        return mean / (1 - beta1**self._steps) / (unbiased + self.optimizer.epsilon)
