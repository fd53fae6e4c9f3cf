"""The fused vocab-parallel head and the whole loss against plain torch in float64: values, gradients, collectives."""

import pytest
import torch

from megatron_amopo.objectives import amopo_loss
from tests.support.jobs_model import collectives_of_the_head, head_and_loss

HIDDEN = 24


def case(vocab_size: int, padded: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (3, 4, 2), generator=generator)
    rows = int(lengths.sum())
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (rows,), generator=generator)
    noise = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    incoming = torch.randn(rows, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, lengths, noise, incoming


def plain(hidden, weight, targets, lengths, noise, incoming, vocab_size):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def logps():
        return (hidden @ weight.t())[:, :vocab_size].log_softmax(-1).gather(1, targets[:, None])[:, 0]

    values = logps()
    logps_gradients = torch.autograd.grad(values, (hidden, weight), incoming)
    parts = logps().split(lengths.flatten().tolist())
    probs = [part.exp().detach() for part in parts]
    sums = torch.stack([part.sum() for part in parts]).view_as(lengths)
    mean = torch.stack([p.mean() for p in probs]).view_as(lengths)
    std = torch.stack([p.std() if len(p) > 1 else torch.zeros((), dtype=p.dtype) for p in probs]).view_as(lengths)
    loss = amopo_loss(sums, lengths, mean, std, noise).loss
    loss_incoming = torch.linspace(0.5, -2.0, loss.shape[0], dtype=loss.dtype)
    loss_gradients = torch.autograd.grad(loss, (hidden, weight), loss_incoming)
    return {
        "logps": values.detach(),
        "loss": loss.detach(),
        "logps_gradients": logps_gradients,
        "loss_gradients": loss_gradients,
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
# 151 and 300 rows don't divide by TP × 128; with 100 of 256 the second of two ranks holds nothing but padding.
@pytest.mark.parametrize(("vocab_size", "padded"), [(151, 256), (300, 512), (100, 256), (256, 256)])
@pytest.mark.parametrize("tp", [1, 2])
def test_values_and_gradients(ranks, tp, vocab_size, padded, dtype, tolerance):
    inputs = case(vocab_size, padded, seed=vocab_size)
    hidden, weight, targets, lengths, noise, incoming = inputs
    chunk_rows = 7 if hidden.shape[0] % 7 else 9
    assert hidden.shape[0] % chunk_rows
    results = ranks.run(
        head_and_loss,
        tp,
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        lengths,
        noise.to(dtype),
        incoming,
        vocab_size,
        chunk_rows,
    )
    expected = plain(*inputs, vocab_size)

    def close(actual, reference):
        assert (actual.double() - reference).norm() <= tolerance * reference.norm()

    for result in results:
        assert result["logps"].dtype == dtype
        close(result["logps"], expected["logps"])
        close(result["loss"], expected["loss"])
    for kind in ("logps_gradients", "loss_gradients"):
        for result in results:  # every rank holds the complete gradient of the hidden states
            close(result[kind][0], expected[kind][0])
        weight_gradient = torch.cat([result[kind][1] for result in results])
        close(weight_gradient, expected[kind][1])
        assert not weight_gradient[vocab_size:].any()


def test_one_max_and_one_sum(ranks):
    hidden, weight, targets, *_ = case(256, 256, seed=3)
    rows = hidden.shape[0]
    calls = ranks.run(collectives_of_the_head, 2, hidden.float(), weight.float(), targets)[1]
    assert calls["forward"] == [("MAX", (rows,)), ("SUM", (2, rows))]
    assert calls["backward"] == [("SUM", (rows, HIDDEN))]  # the hidden states' gradient; nothing over the vocabulary
