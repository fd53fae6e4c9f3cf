"""The optimizers written by hand against torch's, clipping included."""

import pytest
import torch

from megatron_amopo.certification.optimizers import ADAM, MAX_GRAD_NORM, SGD, SGD_BY_ADAM, PlainOptimizer


def torchs(optimizer, parameters):
    if optimizer.betas is None:
        return torch.optim.SGD(parameters, lr=optimizer.learning_rate)
    return torch.optim.Adam(parameters, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.epsilon)


@pytest.mark.parametrize("optimizer", [SGD, ADAM, SGD_BY_ADAM], ids=["sgd", "adam", "sgd-by-adam"])
@pytest.mark.parametrize("size", [0.01, 10.0], ids=["not clipped", "clipped"])
def test_equals_torch(optimizer, size):
    generator = torch.Generator().manual_seed(1)

    def draw():
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}

    shapes = {"matrix": (4, 3), "vector": (5,)}
    weights = draw()
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    plain, expected = PlainOptimizer(optimizer, weights), torchs(optimizer, list(parameters.values()))
    for _ in range(4):
        gradients = {name: size * gradient for name, gradient in draw().items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
        expected.step()
        plain.step(gradients)
    for name, parameter in parameters.items():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_adam_can_be_sgd():
    """With the settings for the distributed optimizer a step is gradient times rate / epsilon, to a thousandth of the
    gradient.
    """
    weight = torch.zeros(3, dtype=torch.float64)
    gradient = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    PlainOptimizer(SGD_BY_ADAM, {"weight": weight}).step({"weight": gradient})
    torch.testing.assert_close(weight, -SGD.learning_rate * gradient, rtol=1e-3, atol=0)
