"""GPUs as their vendors' data sheets describe them. Data, no code beside lookups.

Peaks are dense (without structured sparsity). Bandwidths are per GPU and per direction: half of what data sheets give
for NVLink and PCIe, whose figures count both. Nodes are the vendor's own of eight GPUs, with one network adapter for
each GPU. To add a GPU: a row in :data:`GPUS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_amopo.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU in its node."""

    name: str
    bf16_flops: float  # FLOP/s
    fp8_flops: float | None  # FLOP/s; None: it has no FP8 units
    multiprocessors: int
    memory_bytes: int  # that torch sees: somewhat less than the data sheet's
    memory_bandwidth: float  # bytes/s, as the next four
    nvlink_bandwidth: float
    network_bandwidth: float
    host_link_bandwidth: float  # PCIe
    host_memory_bandwidth: float  # a GPU's share of its node's
    source: str
    per_node: int = 8


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("a100", 312e12, None, 108, 79 * GIB, 2.039e12, 300e9, 25e9, 32e9, 51e9, "A100 80GB SXM, DGX A100"),
            Gpu("h100", 989.4e12, 1978.9e12, 132, 79 * GIB, 3.35e12, 450e9, 50e9, 64e9, 77e9, "H100 SXM, DGX H100"),
            Gpu("h200", 989.4e12, 1978.9e12, 132, 139 * GIB, 4.8e12, 450e9, 50e9, 64e9, 77e9, "H200 SXM, DGX H200"),
            Gpu("b200", 2250e12, 4500e12, 148, 178 * GIB, 8.0e12, 900e9, 50e9, 64e9, 90e9, "B200, DGX B200"),
        )
    }
)


def gpu_of_device(device_name: str) -> Gpu | None:
    """The row that a device is of, by the name that CUDA gives it; None for cards in other forms (PCIe, NVL), which
    may be slower, and for parts of a card (MIG).
    """
    words = device_name.lower().replace("-", " ").split()
    if {"pcie", "nvl", "mig"} & set(words):
        return None
    return next((row for name, row in GPUS.items() if name in words), None)


def gpu(name: str) -> Gpu:
    """The row of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known; known: {', '.join(GPUS)}")
    return GPUS[name]
