"""The fused head without ranks: low precision, working memory, where the weight's gradient goes, refusals. Values
against float64 over several ranks are in ``tests/distributed``, the arithmetic on a block in ``test_head_blocks.py``.
"""

import gc
import re

import pytest
import torch

from megatron_amopo.errors import ConfigError
from megatron_amopo.model import logprobs, response_logps
from megatron_amopo.model.logprobs import DEFAULT_BUFFER_BYTES, Blocks, plan_blocks

LOW_PRECISION = [torch.bfloat16, torch.float16]


def inputs(rows=50, hidden=32, vocab=200, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_(),
        (torch.randn(vocab, hidden, generator=generator) / 4).to(dtype).requires_grad_(),
        torch.randint(0, vocab, (rows,), generator=generator),
    )


def plain(hidden, weight, targets):
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def values_and_gradients(function, hidden, weight, incoming):
    values = function(hidden, weight)
    return values.detach(), *torch.autograd.grad(values, (hidden, weight), incoming.to(values.dtype))


def low_precision_case(dtype):
    """Inputs, the incoming gradient, and values and gradients by the plain implementation: in float64, in dtype."""
    hidden, weight, targets = inputs(rows=300, hidden=64, vocab=1000, dtype=dtype)
    targets[::2] = (hidden @ weight.t()).argmax(-1)[::2]  # likely and unlikely tokens
    incoming = torch.linspace(-1, 3, len(targets))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = values_and_gradients(lambda h, w: plain(h, w, targets), *wide, incoming)
    theirs = values_and_gradients(lambda h, w: plain(h, w, targets), hidden, weight, incoming)
    return hidden, weight, targets, incoming, exact, theirs


def assert_no_less_exact(ours, theirs, exact):
    for mine, their, reference in zip(ours, theirs, exact, strict=True):
        error, allowed = ((x.double() - reference).norm() for x in (mine, their))
        assert 0 < error <= 1.01 * allowed
        assert error < 0.02 * reference.norm()


@pytest.mark.parametrize("blocks", [None, Blocks(300, 128)], ids=["one block", "blocks of columns"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_is_no_less_exact_than_plain(dtype, blocks):
    """Distance from float64 of log-probabilities and both gradients, ours and the plain implementation's with the same
    products and float32 softmax. Equal but for the order of sums, hence one per cent.
    """
    hidden, weight, targets, incoming, exact, theirs = low_precision_case(dtype)
    ours = values_and_gradients(lambda h, w: response_logps(h, w, targets, blocks=blocks), hidden, weight, incoming)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    assert_no_less_exact(ours, theirs, exact)


@pytest.mark.parametrize("blocks", [None, Blocks(70, 128)], ids=["one block", "blocks of rows and columns"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_into_main_grad_is_no_less_exact_than_plain(dtype, blocks):
    """The same as training has it, the weight's gradient in a float32 ``main_grad``: no less exact than one product of
    plain's gradient of logits that comes out in float32.
    """
    hidden, weight, targets, incoming, exact, theirs = low_precision_case(dtype)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    logps = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (grad_logits,) = torch.autograd.grad(logps, logits, incoming)
    assert grad_logits.dtype == dtype
    in_float32 = grad_logits.float().t() @ hidden.detach().float()
    distance, rounded = ((x.double() - exact[2]).norm() for x in (in_float32, theirs[2]))
    assert distance < 0.9 * rounded  # so a product that is rounded on its way would be noticed
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    values = response_logps(hidden, weight, targets, blocks=blocks)
    grad_hidden, placeholder = torch.autograd.grad(values, (hidden, weight), incoming, allow_unused=True)
    assert placeholder is None
    ours = (values.detach(), grad_hidden, weight.main_grad)
    assert [x.dtype for x in ours] == [torch.float32, dtype, torch.float32]
    assert_no_less_exact(ours, (*theirs[:2], in_float32), exact)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_main_grad_sums_micro_batches_in_float32(dtype):
    """Blocks of rows and micro-batches add to ``main_grad`` without being rounded on the way."""
    hidden, weight, targets = inputs(rows=300, dtype=dtype)
    exact = torch.zeros_like(weight, dtype=torch.float64)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    for rows in (slice(0, 100), slice(100, 300)):
        incoming = torch.linspace(-1, 3, len(targets[rows]))
        logps = response_logps(hidden[rows], weight, targets[rows], blocks=Blocks(70, 60))
        (gradient,) = torch.autograd.grad(logps, weight, incoming, allow_unused=True)
        assert gradient is None
        # From the same logits in this precision, so that only the sums differ.
        grad_logits = torch.zeros(len(incoming), len(weight), dtype=torch.float64)
        grad_logits[torch.arange(len(incoming)), targets[rows]] = incoming.double()
        logits = (hidden[rows] @ weight.t()).float()
        grad_logits -= logits.softmax(-1).double() * incoming[:, None].double()
        exact += grad_logits.to(dtype).double().t() @ hidden[rows].detach().double()
    assert (weight.main_grad.double() - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_placeholder_of_a_gradient_in_main_grad(dtype):
    """What Megatron's data-parallel hooks find: a tensor, without memory of its own, and the mark not to add it."""
    hidden, weight, targets = inputs(dtype=dtype)
    expected = [torch.autograd.grad(response_logps(hidden, weight, targets).sum(), x)[0] for x in (hidden, weight)]
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    for times in (1, 2):
        response_logps(hidden, weight, targets).sum().backward()
        assert weight.grad_added_to_main_grad
        assert weight.grad.shape == weight.shape
        assert weight.grad.data_ptr() == weight.main_grad.data_ptr()
        torch.testing.assert_close(weight.main_grad, times * expected[1].float() + 1, rtol=2e-2, atol=1e-2)
        if dtype == torch.float32:
            torch.testing.assert_close(weight.main_grad, times * expected[1] + 1)
    torch.testing.assert_close(hidden.grad, 2 * expected[0])


def test_gradient_of_another_user_of_the_weight():
    """Tied embeddings: autograd gets the other user's gradient alone, which the hooks add to ``main_grad``."""
    hidden, weight, targets = inputs()
    (expected,) = torch.autograd.grad(response_logps(hidden, weight, targets).sum(), weight)
    weight.main_grad = torch.ones_like(weight)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    (response_logps(hidden, weight, targets).sum() + (3.0 * weight).sum()).backward()
    assert weight.grad_added_to_main_grad
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0))
    torch.testing.assert_close(weight.main_grad, expected + 1)


def test_main_grad_smaller_than_the_weight():
    """``--grad-reduce-in-bf16`` in float32: the placeholder doesn't fit into it."""
    hidden, weight, targets = inputs()
    (expected,) = torch.autograd.grad(response_logps(hidden, weight, targets).sum(), weight)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.bfloat16)
    weight.grad_added_to_main_grad = False
    response_logps(hidden, weight, targets).sum().backward()
    assert weight.grad.shape == weight.shape
    assert (weight.main_grad - expected).norm() < 0.01 * expected.norm()


def test_frozen_weight_gets_no_gradient():
    hidden, weight, targets = inputs()
    weight = weight.detach()
    weight.main_grad = torch.zeros_like(weight)
    response_logps(hidden, weight, targets).sum().backward()
    assert hidden.grad.any()
    assert not weight.main_grad.any()


@pytest.mark.parametrize("into_main_grad", [False, True])
def test_keeps_nothing_of_size_rows_by_vocabulary(into_main_grad):
    """Neither among what autograd saves nor anywhere else: of memory that a tensor holds, whatever its own size."""
    hidden, weight, targets = inputs()
    if into_main_grad:
        weight.main_grad = torch.zeros_like(weight)
    assert hidden.numel() < weight.numel() < len(targets) * len(weight)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        before = living_tensors()  # and held here, so that no new one has an old one's id
        known = {id(tensor) for tensor in before}
        logps = response_logps(hidden, weight, targets)
    # Attributes of the autograd node and what they refer to are among the living.
    kept = [tensor for tensor in living_tensors() if id(tensor) not in known]
    assert saved
    assert any(tensor is logps for tensor in kept)
    assert max(tensor.untyped_storage().nbytes() for tensor in (*saved, *kept)) <= weight.nbytes


def living_tensors():
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def test_logits_exist_in_the_buffer_alone(monkeypatch):
    """Every product of hidden states and weight goes to memory of the planned size."""
    sizes = []
    buffer = logprobs._LogitsBuffer

    class Recorded(buffer):
        def __call__(self, rows, columns):
            logits = super().__call__(rows, columns)
            sizes.append((self._memory.nbytes, logits.data_ptr() == self._memory.data_ptr()))
            return logits

    monkeypatch.setattr(logprobs, "_LogitsBuffer", Recorded)
    hidden, weight, targets = inputs(rows=700, vocab=5000)
    response_logps(hidden, weight, targets, buffer_bytes=2**21).sum().backward()
    assert len(sizes) == 2 * 8  # blocks of 700 × 640, forward and backward
    assert all(nbytes <= 2**21 and in_buffer for nbytes, in_buffer in sizes)


@pytest.mark.parametrize("hidden_size", [64, 896, 5120])
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("element_size", [2, 4])
def test_planned_memory_is_two_percent_of_the_logits(element_size, tp, hidden_size):
    """8,192 rows by 152,064 columns: logits buffer and the float32 sum of the hidden gradient, if there is one, within
    2 % of rows × vocabulary × 4 bytes, with room for the rest; and products large enough to be quick.
    """
    rows, columns = 8192, 152_064 // tp
    blocks = plan_blocks(rows, columns, hidden_size, element_size=element_size)
    sums = 4 * blocks.rows * hidden_size if element_size < 4 and blocks.columns < columns else 0
    assert element_size * blocks.rows * blocks.columns + sums <= DEFAULT_BUFFER_BYTES < 0.7 * 0.02 * rows * 152_064 * 4
    assert blocks.rows >= 1024
    assert blocks.columns >= 4096
    assert blocks.columns % 64 == 0


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (100, 200, Blocks(100, 200)),  # everything fits
        (8192, 19_008, Blocks(1639, 19_008)),  # whole vocabulary, few rows less than would fit
        (8192, 19_001, Blocks(1639, 19_001)),  # as it is, if it isn't cut
        (8192, 152_064, Blocks(2048, 15_232)),  # cut both ways
        (0, 0, Blocks(1, 1)),
    ],
)
def test_plan(rows, columns, expected):
    assert plan_blocks(rows, columns, 64, element_size=2) == expected


def test_plan_of_all_rows():
    """Each entry of the weight's gradient is one product's; columns make up for it."""
    blocks = plan_blocks(8192, 152_064, 896, element_size=2, all_rows=True)
    assert blocks.rows == 8192
    assert 0.8 * DEFAULT_BUFFER_BYTES <= blocks.rows * (2 * blocks.columns + 4 * 896) <= DEFAULT_BUFFER_BYTES
    # A sum beyond the buffer leaves logits a quarter of it.
    assert (
        0.9 * DEFAULT_BUFFER_BYTES
        <= 4 * 2 * 8192 * plan_blocks(8192, 152_064, 5120, element_size=2, all_rows=True).columns
        <= DEFAULT_BUFFER_BYTES
    )


def test_blocks_cover_everything_once():
    for length in (1, 5, 7, 20):
        for step in (1, 3, 7, 50):
            covered = [i for part in Blocks(step, 1).of_rows(length) for i in range(length)[part]]
            assert covered == list(range(length))


def test_extreme_logits_stay_finite():
    hidden, weight, targets = inputs()
    result = response_logps(hidden * 1e4, weight, targets, blocks=Blocks(7, 30))
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
        ({"buffer_bytes": 0}, "buffer_bytes is 0"),
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
