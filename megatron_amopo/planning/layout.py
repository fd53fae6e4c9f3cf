"""How a run is spread over GPUs, and the options that change its memory or its time. Plain values."""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_amopo.data.groups import Sharing
from megatron_amopo.training.fp8 import ALIGNMENT

Recompute = Literal["none", "mlp", "full"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)

Precision = Literal["bf16", "fp8-delayed", "fp8-tensorwise", "fp8-blockwise"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Layout:
    """Ranks by kind of parallelism, in Megatron's order from the innermost: tensor, context, data, pipeline."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    chunks: int = 1  # model chunks of a pipeline rank (virtual pipeline stages); 1: the plain schedule
    count_ends: bool = False  # embedding and loss count as a layer each where layers are dealt to stages
    recompute: Recompute = "none"
    sequence_parallel: bool = True  # means something where tp > 1

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def splits_sequence(self) -> int:
        """Ranks that share the hidden states of a tensor-parallel group's tokens outside its matrix products."""
        return self.tp if self.sequence_parallel else 1

    def __str__(self) -> str:
        parts = [f"TP{self.tp}", f"PP{self.pp}" + (f"×{self.chunks}" if self.chunks > 1 else "")]
        parts += [f"CP{self.cp}"] if self.cp > 1 else []
        return " ".join([*parts, f"DP{self.dp}"])

    @property
    def stages(self) -> range:
        return range(self.pp)


@dataclass(frozen=True)
class Options:
    """What a run is told beside its layout; flags of the training command."""

    global_batch: int
    micro_batch: int = 1
    precision: Precision = "bf16"
    distributed_optimizer: bool = True
    precision_aware_optimizer: bool = False  # main weights as remainders, both moments in bf16
    optimizer_cpu_offload: bool = False
    bf16_gradients: bool = False  # --grad-reduce-in-bf16
    attention: Literal["fa3", "varlen"] = "varlen"
    sharing: Sharing = "tree"

    @property
    def is_fp8(self) -> bool:
        return self.precision != "bf16"

    @property
    def fp8_recipe(self) -> str:
        """Megatron's name of it; of bf16, its default, which nothing reads."""
        return self.precision.removeprefix("fp8-") if self.is_fp8 else "delayed"

    @property
    def token_multiple(self) -> int:
        """What the tokens of a rank are padded to a multiple of."""
        return ALIGNMENT[self.fp8_recipe] if self.is_fp8 else 1


@dataclass(frozen=True)
class Software:
    """What a training program does in a way of its own; the default is this project's."""

    tp_overlap: bool = False  # --tp-comm-overlap
    ring_context: bool = False  # context parallelism sends keys and values around, instead of exchanging heads
    fsdp: bool = False  # weights are gathered, gradients scattered, in every micro-batch
    trains_weights: bool = True  # no: adapters alone, whose own work is left out
    stores_logits: bool = False  # all tokens go through the head, whose logits are kept


THIS_PROJECT = Software()
