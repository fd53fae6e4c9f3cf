"""The launch command of a layout. A test gives it to Megatron's own parser and this project's checks."""

import shlex
from dataclasses import dataclass

from megatron_amopo.planning.layout import Layout, Options
from megatron_amopo.planning.sizes import ModelSizes
from megatron_amopo.training.fp8 import RECIPE_FLAGS


@dataclass(frozen=True)
class Places:
    """What the command reads and writes."""

    model: str
    data: str
    save: str


def training_flags(sizes: ModelSizes, layout: Layout, options: Options, places: Places) -> list[str]:
    """Flags of ``megatron_amopo.train``; hyperparameters are the published ones (SimPO)."""
    flags = ["--amopo-data", places.data, "--amopo-hf-model", places.model, "--save", places.save, "--load"]
    flags += [places.save, "--bf16", "--tensor-model-parallel-size", str(layout.tp)]
    if layout.tp > 1 and layout.sequence_parallel:
        flags += ["--sequence-parallel"]
    flags += ["--pipeline-model-parallel-size", str(layout.pp)]
    if layout.count_ends:
        flags += ["--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"]
    if layout.chunks > 1:
        layers = (sizes.layers + 2 * layout.count_ends) // (layout.pp * layout.chunks)
        flags += ["--num-layers-per-virtual-pipeline-stage", str(layers)]
    flags += ["--context-parallel-size", str(layout.cp)]
    flags += ["--micro-batch-size", str(options.micro_batch), "--global-batch-size", str(options.global_batch)]
    flags += _optimizer(layout, options)
    if options.is_fp8:
        flags += RECIPE_FLAGS[options.fp8_recipe]
    if layout.recompute == "full":
        flags += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    elif layout.recompute == "mlp":
        flags += ["--recompute-granularity", "selective", "--recompute-modules", "mlp"]
    if options.attention == "fa3":
        flags += ["--amopo-attention", "fa3"]
    if options.sharing != "tree":
        flags += ["--amopo-share-prefixes", options.sharing]
    flags += ["--amopo-epochs", "3", "--lr", "3e-7", "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1"]
    flags += ["--clip-grad", "3.0", "--weight-decay", "0"]
    return [*flags, "--save-interval", "200", "--eval-interval", "200"]


def launch_command(
    sizes: ModelSizes, layout: Layout, options: Options, places: Places, *, gpus_per_node: int
) -> list[str]:
    """Words of the ``torchrun`` command; more than one node finds the others at ``$MASTER_ADDR:29500``."""
    per_node = min(layout.gpus, gpus_per_node)
    nodes = -(-layout.gpus // per_node)
    launcher = ["torchrun", "--nproc-per-node", str(per_node)]
    if nodes > 1:
        launcher += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "$MASTER_ADDR:29500"]
    return [*launcher, "-m", "megatron_amopo.train", *training_flags(sizes, layout, options, places)]


def shown(words: list[str], *, width: int = 118) -> str:
    """The command over several lines, to be pasted into a shell."""
    lines, line = [], ""
    for number, word in enumerate(words):
        quoted = f'"{word}"' if word.startswith("$") else shlex.quote(word)
        # A flag stays with its value.
        unit = len(quoted) + (len(words[number + 1]) + 1 if word.startswith("-") and number + 1 < len(words) else 0)
        if line and word.startswith("-") and len(line) + unit + 3 > width:
            lines.append(line)
            line = "   "
        line = f"{line} {quoted}" if line else quoted
    return " \\\n".join([*lines, line])


def _optimizer(layout: Layout, options: Options) -> list[str]:
    flags = ["--use-distributed-optimizer"] if options.distributed_optimizer else []
    if layout.dp * layout.cp > 1:
        flags += ["--overlap-grad-reduce"]
        flags += ["--overlap-param-gather"] if options.distributed_optimizer else []
    if options.bf16_gradients:
        flags += ["--grad-reduce-in-bf16"]
    if options.precision_aware_optimizer:
        flags += ["--use-precision-aware-optimizer"]
        if not options.optimizer_cpu_offload:
            flags += ["--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
    if options.optimizer_cpu_offload:
        flags += ["--optimizer-cpu-offload", "--optimizer-offload-fraction", "1.0"]
    return flags
