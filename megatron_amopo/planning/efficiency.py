"""The constants of the time estimate: what share of a data sheet's peaks is reached. One set for everything.

Two are calibrated, by least squares of the logarithm of step time on the published runs that
``benchmarks/published_runs.py`` marks for it (``python -m benchmarks.planner`` prints what they become when each of
these runs is left out). The others are stated beforehand, from the sources named.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """Shares of peaks, dimensionless where no unit is named."""

    # Calibrated: of the tensor cores' dense peak, for large matrices.
    gemm_bf16: float = 0.64
    gemm_fp8: float = 0.59

    # What communication beside computation still costs, by waiting and contention. The published runs can't tell it
    # from the efficiency of matrix products: with 0 to 0.4, they are met equally well.
    exposed: float = 0.2

    # Wave quantisation: a matrix product of W waves of tiles takes as long as W + 1/2, half a wave being the mean loss.
    lost_waves: float = 0.5
    tile: int = 128 * 256  # outputs of a tile (cuBLAS and CUTLASS on Hopper)

    # Of the bf16 peak at L keys per query, causal, head size 128: peak · L / (L + half). After the figures of
    # FlashAttention-3 (arXiv 2407.08608, H100); `varlen` is FlashAttention-2 there, about half as fast.
    fa3_forward: float = 0.66
    fa3_forward_half: int = 600
    fa3_backward: float = 0.57
    fa3_backward_half: int = 900
    varlen_of_fa3: float = 0.55

    # Streaming kernels and NCCL's large messages reach about this of the data sheet's bandwidths.
    memory: float = 0.80
    nvlink: float = 0.80
    network: float = 0.80
    host_memory: float = 0.60  # the optimizer on the CPU
    collective_seconds: float = 15e-6  # what a collective takes however small it is (NCCL within a node)

    # What Python and the launches of one layer's kernels take, forward and backward pass of a micro-batch: a step is
    # never faster than that.
    host_seconds_per_layer: float = 0.8e-3
    step_seconds: float = 0.02  # gradient norm, logging, synchronisation

    def attention(self, backend: str, keys: float, *, backward: bool) -> float:
        """Share of the bf16 peak."""
        top, half = (
            (self.fa3_backward, self.fa3_backward_half) if backward else (self.fa3_forward, self.fa3_forward_half)
        )
        return top * keys / (keys + half) * (1.0 if backend == "fa3" else self.varlen_of_fa3)


DEFAULT = Efficiency()
