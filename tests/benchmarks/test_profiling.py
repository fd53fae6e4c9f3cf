"""Which operators belong to what: names as torch's profiler gives them, on CPU and CUDA."""

from dataclasses import dataclass

import pytest

from benchmarks.profiling import ATTENTION, HEAD, LAYERS, REST, category


@dataclass
class Event:
    """An operator of a profile, as far as its category depends on it."""

    name: str
    cpu_parent: "Event | None" = None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["aten::linear", "aten::addmm"], LAYERS),
        # Transformer Engine's, whose products are no operators of torch.
        (["_Linear", "void nvjet_hsh_128x256"], LAYERS),
        (["_LayerNormLinearBackward", "aten::add"], LAYERS),
        (["_LayerNormMLP"], LAYERS),
        (["_LinearUnknown"], REST),
        (["aten::add"], REST),
        (["core attention", "aten::index_select"], ATTENTION),
        (["ScaledDotProductFlashAttentionForCpuBackward0", "aten::bmm"], ATTENTION),
        (["torch_attn::_varlen_attn_backward"], ATTENTION),
        (["aten::_flash_attention_backward"], ATTENTION),
        (["FlashAttnVarlenFuncBackward", "aten::mm"], ATTENTION),
        (["_ResponseLogpsBackward", "aten::mm"], HEAD),
    ],
)
def test_the_first_that_it_or_a_caller_names(names, expected):
    event = None
    for name in names:  # callers first
        event = Event(name, event)
    assert category(event) == expected
