"""The fused vocab-parallel head and the whole loss against plain torch in float64: values, gradients, collectives.
Names of tests say which known fault of such heads they exclude.
"""

import pytest
import torch

from megatron_amopo.objectives import Pairs, amopo_loss
from tests.support.jobs_head import collectives_of_the_head, head_and_loss

HIDDEN = 24
FLOATS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


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
    loss = amopo_loss(Pairs(sums, lengths, mean, std, noise)).loss
    loss_incoming = torch.linspace(0.5, -2.0, loss.shape[0], dtype=loss.dtype)
    loss_gradients = torch.autograd.grad(loss, (hidden, weight), loss_incoming)
    return {
        "logps": values.detach(),
        "loss": loss.detach(),
        "logps_gradients": logps_gradients,
        "loss_gradients": loss_gradients,
    }


def compare(ranks, tp, inputs, vocab_size, dtype, tolerance, blocks):
    """Run on ``tp`` ranks and compare with float64; the results and the expected ones."""
    hidden, weight, targets, lengths, noise, incoming = inputs
    floats = (hidden.to(dtype), weight.to(dtype), targets, lengths, noise.to(dtype), incoming)
    results = ranks.run(head_and_loss, tp, *floats, vocab_size, blocks)
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
    return results, expected


@pytest.mark.parametrize(("dtype", "tolerance"), FLOATS, ids=["float64", "float32"])
# 151 and 300 rows don't divide by TP × 128; with 100 of 256 the second of two ranks holds nothing but padding.
@pytest.mark.parametrize(("vocab_size", "padded"), [(151, 256), (300, 512), (100, 256), (256, 256)])
@pytest.mark.parametrize("tp", [1, 2])
def test_uneven_vocabulary(ranks, tp, vocab_size, padded, dtype, tolerance):
    inputs = case(vocab_size, padded, seed=vocab_size)
    num_rows = inputs[0].shape[0]
    blocks = (7 if num_rows % 7 else 9, 39)  # neither divides rows or columns
    assert num_rows % blocks[0]
    compare(ranks, tp, inputs, vocab_size, dtype, tolerance, blocks)


def test_four_ranks_of_which_two_hold_padding(ranks):
    compare(ranks, 4, case(101, 256, seed=4), 101, torch.float64, 1e-12, (1000, 1000))


def test_gradient_not_only_right_when_the_incoming_one_is_one(ranks):
    """The sum of log-probabilities has incoming gradients of one; here they differ in size and sign, one being zero."""
    *inputs, incoming = case(256, 256, seed=1)
    incoming = torch.linspace(-3, 5, len(incoming), dtype=torch.float64)
    incoming[4] = 0
    results, _ = compare(ranks, 2, (*inputs, incoming), 256, torch.float64, 1e-12, (7, 39))
    gradient = results[0]["logps_gradients"][0]
    assert not gradient[4].any()
    assert gradient.any(dim=1).sum() == len(incoming) - 1


def test_gradient_passes_the_all_reduce(ranks):
    """A target's logit that reaches the other ranks by an all-reduce that autograd doesn't know leaves them the softmax
    part of the gradient alone. So let all targets stand on the first of two ranks.
    """
    hidden, weight, targets, *rest = case(256, 256, seed=2)
    targets %= 128
    results, expected = compare(ranks, 2, (hidden, weight, targets, *rest), 256, torch.float64, 1e-12, (1000, 1000))
    assert torch.equal(results[0]["logps_gradients"][0], results[1]["logps_gradients"][0])
    assert results[1]["logps_gradients"][1].any()
    assert expected["logps_gradients"][0].any()


def test_loss_not_off_by_the_tp_size(ranks):
    inputs = case(256, 256, seed=5)
    losses = [
        compare(ranks, tp, inputs, 256, torch.float64, 1e-12, (1000, 1000))[0][0]["loss"].sum() for tp in (1, 2, 4)
    ]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(3), rtol=1e-12, atol=0)


def test_one_max_and_one_sum(ranks):
    hidden, weight, targets, *_ = case(256, 256, seed=3)
    rows = hidden.shape[0]
    assert rows not in (HIDDEN, 128, 256)  # nothing of the vocabulary's size would pass for it
    calls = ranks.run(collectives_of_the_head, 2, hidden.float(), weight.float(), targets)[1]
    assert calls["forward"] == [("MAX", (rows,)), ("SUM", (2, rows))]
    assert calls["backward"] == [("SUM", (rows, HIDDEN))]  # the hidden states' gradient; nothing over the vocabulary


def test_no_rows_on_two_ranks(ranks):
    """A micro-batch without response rows still takes part in every collective, or the next would not match."""
    hidden, weight, targets, *_ = case(256, 256, seed=3)
    calls = ranks.run(collectives_of_the_head, 2, hidden[:0].float(), weight.float(), targets[:0])[1]
    assert calls == {"forward": [("MAX", (0,)), ("SUM", (2, 0))], "backward": [("SUM", (0, HIDDEN))]}
