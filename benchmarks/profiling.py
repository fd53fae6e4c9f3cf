"""Where the time of a step goes, by torch's profiler: attention, matrix products of the layers, head, the rest.

Each operator's own time, without what it calls, belongs to the first category that it or one of its callers names: the
head's autograd function, forwards and backwards; attention, which is the core attention module on the way forward and
the kernel's own backward on the way back (what copies keys of a shared prompt is then counted under the rest); any
other matrix product, and all that a layer of Transformer Engine computes with its norm. On CUDA it is the time of the
kernels, not of their launches.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_amopo import device

HEAD, ATTENTION, LAYERS, REST = "head", "attention", "linear layers", "rest"
CATEGORIES = (LAYERS, ATTENTION, HEAD, REST)

_OPERATORS_OF_REST = 4
_ATTENTION_RANGE = "core attention"
# Operators and autograd functions of torch's scaled_dot_product_attention and varlen_attn, and of FlashAttention-3.
_ATTENTION_KERNEL = re.compile("scaled_?dot_?product|varlen_attn|flash_?attn|flash_?attention", re.IGNORECASE)
# Transformer Engine's products are calls of its own within autograd functions of its modules.
_ENGINE_LAYER = re.compile(r"_(LayerNorm)?(Grouped)?(Linear|MLP)(Backward)?")
_MATRIX_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"}


@dataclass(frozen=True)
class TimeShares:
    """Where the time of a step goes, in shares of it."""

    categories: dict[str, float]  # of each of CATEGORIES
    rest: dict[str, float]  # the largest operators of the rest


def time_shares(model: torch.nn.Module, step: Callable[[], Any], *, calls: int = 3) -> TimeShares:
    """Shares over some calls of ``step``, which computes with ``model``."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.has_cuda() else [])]
    with _named_attention(model), profile(activities=activities) as profiler:
        for _ in range(calls):
            step()
    microseconds: Counter[str] = Counter(dict.fromkeys(CATEGORIES, 0))
    rest: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:
            continue  # kernels, whose time is also that of the operator that launched them
        spent = event.self_device_time_total if device.has_cuda() else event.self_cpu_time_total
        kind = category(event)
        microseconds[kind] += spent
        if kind == REST:
            rest[event.name] += spent
    total = sum(microseconds.values())
    return TimeShares(
        {name: spent / total for name, spent in microseconds.items()},
        {name: spent / total for name, spent in rest.most_common(_OPERATORS_OF_REST)},
    )


def category(event: Any) -> str:
    """The category of an operator of the profile, one of :data:`CATEGORIES`."""
    is_product = False
    while event is not None:
        if "_ResponseLogps" in event.name:
            return HEAD
        if event.name == _ATTENTION_RANGE or _ATTENTION_KERNEL.search(event.name):
            return ATTENTION
        is_product = is_product or event.name in _MATRIX_PRODUCTS or _ENGINE_LAYER.fullmatch(event.name) is not None
        event = event.cpu_parent
    return LAYERS if is_product else REST


@contextmanager
def _named_attention(model: torch.nn.Module) -> Iterator[None]:
    """Every core attention module runs within a range that the profiler sees."""
    from megatron_amopo.model.attention import PackedAttention

    ranges: list[Any] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(_ATTENTION_RANGE))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if isinstance(module, PackedAttention):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
