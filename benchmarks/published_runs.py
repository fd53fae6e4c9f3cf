"""Published runs of dense models on Megatron: facts, with their sources, that the planner's estimates are held against.

Rates are per GPU. FP8 is tensor-wise current scaling in the containers of 2025 and delayed scaling in those of 2024;
for those of 2026 the sources say only FP8, and tensor-wise is taken. To add a run: a row in :data:`RUNS`.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_amopo.planning.layout import Precision
from megatron_amopo.planning.sizes import ModelSizes

Use = Literal["calibration", "held out", "not described"]

#: Sizes as their config.json files or papers state them.
MODELS = {
    "Llama 3 8B": ModelSizes(32, 4096, 14336, 32, 8, 128, 128_256, tied=False),
    "Llama 3 70B": ModelSizes(80, 8192, 28672, 64, 8, 128, 128_256, tied=False),
    "Llama 3.1 405B": ModelSizes(126, 16384, 53248, 128, 8, 128, 128_256, tied=False),
    "Qwen3 8B": ModelSizes(36, 4096, 12288, 32, 8, 128, 151_936, tied=False, qk_norm=True),
    "Llama 2 7B": ModelSizes(32, 4096, 11008, 32, 32, 128, 32_000, tied=False),
    "Llama 2 13B": ModelSizes(40, 5120, 13824, 40, 40, 128, 32_000, tied=False),
    "Llama 2 70B": ModelSizes(80, 8192, 28672, 64, 8, 128, 32_000, tied=False),
    # Its MLP has two matrices of width 4 · 12,288. Three of width 32,768 have as many weights and operations.
    "GPT-3 175B": ModelSizes(96, 12288, 32768, 96, 96, 128, 51_200, tied=True),
}

_BRIDGE = "Megatron-Bridge performance summary"
_CARD = "Megatron-Bridge verification card"
_NEMO = "NeMo performance benchmarks, 24.07"
_GPT3 = "Megatron-LM README; layout not published, TP 8 × PP 12 × VP 8 assumed"


@dataclass(frozen=True)
class PublishedRun:
    """One run and how fast it was."""

    model: str
    task: str
    gpu: str
    gpus: int
    precision: Precision
    global_batch: int
    micro_batch: int
    sequence: int
    tp: int
    pp: int
    cp: int
    chunks: int
    source: str
    tokens_per_second: float | None = None  # per GPU
    peak_share: float | None = None  # instead: of bf16's peak, by operations as Megatron-LM's README counts them
    fsdp: bool = False
    adapters: bool = False  # LoRA
    listed: bool = True  # in the list of runs that this project set itself as the target
    use: Use = "held out"
    why: str = ""  # it isn't described

    @property
    def sizes(self) -> ModelSizes:
        return MODELS[self.model]

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def count_ends(self) -> bool:
        """Whether embedding and loss must count as layers, as layers alone can't be dealt evenly."""
        return self.sizes.layers % (self.pp * self.chunks) != 0

    @property
    def step_seconds(self) -> float:
        if self.tokens_per_second is not None:
            return self.global_batch * self.sequence / self.gpus / self.tokens_per_second
        assert self.peak_share is not None
        return self._gpt_flops / (self.gpus * self.peak_share * 989.4e12)

    @property
    def _gpt_flops(self) -> float:
        """Narayanan et al. 2021 (arXiv 2104.04473), without recomputation; attention counts all pairs."""
        layers, hidden = self.sizes.layers, self.sizes.hidden
        per_token = 1 + self.sequence / (6 * hidden) + self.sizes.vocabulary / (16 * layers * hidden)
        return 72 * self.global_batch * self.sequence * layers * hidden**2 * per_token

    def __str__(self) -> str:
        layout = f"TP{self.tp} PP{self.pp}" + (f"×{self.chunks}" if self.chunks > 1 else "")
        layout += f" CP{self.cp}" if self.cp > 1 else ""
        return f"{self.model}, {self.task}, {self.gpus:,} {self.gpu}, {layout}" + (" FSDP" if self.fsdp else "")


_TENSORWISE: Precision = "fp8-tensorwise"
_DELAYED: Precision = "fp8-delayed"


def _run(
    model: str, gpus: int, precision: Precision, batch: tuple[int, int], sequence: int,
    layout: tuple[int, int, int, int], source: str, tokens_per_second: float | None = None,
    *, gpu: str = "h100", task: str = "pre-train", peak_share: float | None = None, fsdp: bool = False,
    adapters: bool = False, listed: bool = True, use: Use = "held out", why: str = "",
) -> PublishedRun:  # fmt: skip
    """A row: batch is (global, micro), layout (TP, PP, CP, VP)."""
    return PublishedRun(
        model, task, gpu, gpus, precision, *batch, sequence, *layout, source, tokens_per_second, peak_share, fsdp,
        adapters, listed, use, why,
    )  # fmt: skip


RUNS = (
    # The list that was set as the target.
    _run("Llama 3 8B", 8, _TENSORWISE, (128, 1), 8192, (1, 1, 1, 1), f"{_BRIDGE}, 25.11", 14451,
         fsdp=True, use="calibration"),
    _run("Llama 3 8B", 8, _TENSORWISE, (128, 1), 8192, (1, 1, 1, 1), f"{_BRIDGE}, 25.09", 14079, fsdp=True),
    _run("Llama 3 70B", 64, _TENSORWISE, (128, 1), 8192, (4, 8, 1, 5), f"{_BRIDGE}, 25.11", 1602, use="calibration"),
    _run("Llama 3 70B", 64, _TENSORWISE, (256, 1), 8192, (4, 8, 1, 5), f"{_BRIDGE}, 26.04.01", 1664,
         use="calibration"),
    _run("Llama 3 70B", 32, _TENSORWISE, (32, 1), 4096, (4, 4, 1, 5), f"{_BRIDGE}, 26.06", 1638, task="SFT, packed",
         use="calibration"),
    _run("Llama 3 70B", 8, _TENSORWISE, (32, 1), 4096, (2, 4, 1, 20), f"{_BRIDGE}, 26.06", 2643, task="LoRA",
         adapters=True),
    _run("Llama 3.1 405B", 1024, _TENSORWISE, (1536, 1), 8192, (8, 8, 2, 8), f"{_BRIDGE}, 26.06", 326,
         use="calibration"),
    _run("Qwen3 8B", 16, "bf16", (1024, 1), 4096, (1, 1, 1, 1), f"{_CARD}, 2026-07-21", 10456, use="calibration"),
    _run("Qwen3 8B", 4, "bf16", (32, 1), 2048, (4, 1, 1, 1), f"{_CARD}, 2026-07-19", 2207, task="SFT, packed",
         use="not described",
         why="6 ms per layer and micro-batch of 2,048 tokens on four GPUs, where computation takes 1.5 ms: what takes "
         "the rest isn't published, and is none of the things that are estimated here"),
    _run("GPT-3 175B", 96, "bf16", (1152, 1), 4096, (8, 12, 1, 8), _GPT3, peak_share=0.47),
    _run("GPT-3 175B", 4608, "bf16", (1152, 1), 4096, (8, 12, 1, 8), _GPT3, peak_share=0.42),
    # More runs of the same kind, which no constant was chosen by.
    _run("Llama 3 70B", 64, _TENSORWISE, (128, 1), 8192, (4, 8, 1, 5), f"{_BRIDGE}, 25.09", 1619, listed=False),
    _run("Llama 3 70B", 64, _TENSORWISE, (256, 1), 8192, (4, 8, 1, 5), f"{_BRIDGE}, 26.02", 1621, listed=False),
    _run("Llama 3.1 405B", 1024, _TENSORWISE, (512, 1), 8192, (8, 8, 2, 8), f"{_BRIDGE}, 25.09", 302, listed=False),
    _run("Llama 3.1 405B", 1024, _TENSORWISE, (512, 1), 8192, (8, 8, 2, 8), f"{_BRIDGE}, 25.11", 292, listed=False),
    _run("Llama 3.1 405B", 1024, _TENSORWISE, (1536, 1), 8192, (8, 8, 2, 8), f"{_BRIDGE}, 26.02", 311, listed=False),
    _run("Llama 2 7B", 8, _DELAYED, (128, 1), 4096, (1, 1, 1, 1), _NEMO, 16934, listed=False),
    _run("Llama 2 13B", 16, _DELAYED, (128, 1), 4096, (1, 4, 1, 10), _NEMO, 8715, listed=False),
    _run("Llama 2 70B", 64, _DELAYED, (128, 1), 4096, (4, 4, 1, 20), _NEMO, 1728, listed=False),
    _run("Llama 3 8B", 8, _DELAYED, (128, 1), 8192, (1, 1, 2, 1), _NEMO, 12273, listed=False),
    _run("Llama 3 70B", 64, _DELAYED, (128, 1), 8192, (4, 4, 2, 5), _NEMO, 1524, listed=False),
    _run("Llama 3 8B", 8, _TENSORWISE, (128, 2), 8192, (1, 1, 1, 1), f"{_BRIDGE}, 25.11", 30624, gpu="b200",
         listed=False),
    _run("Llama 3.1 405B", 128, _TENSORWISE, (64, 1), 8192, (4, 8, 2, 8), f"{_BRIDGE}, 25.11", 661, gpu="b200",
         listed=False),
)  # fmt: skip
