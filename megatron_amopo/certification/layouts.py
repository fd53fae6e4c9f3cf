"""What is certified: problems, each with one right result, and the layouts that must all come to it. Data, no code.

A :class:`Problem` says what is computed, a :class:`Layout` how. To certify another combination, add a row to
:data:`LAYOUTS`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What is computed."""

    family: str = "qwen2"  # transformers' model type
    tied: bool = True  # the output layer is the embedding
    dimensions: int = 3  # D
    pairwise: str = "simpo"
    weighting: str = "gaussian"
    shared_question: bool = True  # all prompts of a record begin with the same tokens, as question-first prompts do
    key_value_heads: int = 4  # of 8
    bf16_weights: bool = False  # the first weights have values that bf16 has, too

    @property
    def has_reference(self) -> bool:
        """Whether its loss compares the model with the one that it started from."""
        return self.pairwise in ("dpo", "ipo", "modpo")

    @property
    def has_scores(self) -> bool:
        """Whether its loss reads the records' scores, which are then random."""
        return self.pairwise == "modpo" or self.weighting == "from-scores"


@dataclass(frozen=True)
class Layout:
    """How it is computed: on how many ranks, with which flags of the training command."""

    name: str
    ranks: int
    flags: tuple[str, ...] = ()
    problem: Problem = Problem()
    gpus: bool = False  # NCCL, a GPU for each rank; otherwise gloo on the CPU

    @property
    def distributed_optimizer(self) -> bool:
        return "--use-distributed-optimizer" in self.flags

    @property
    def bf16(self) -> bool:
        return "--bf16" in self.flags

    @property
    def all_flags(self) -> tuple[str, ...]:
        """With the size of a micro-batch: one record, where the layout doesn't say another."""
        given = {"--micro-batch-size", "--amopo-max-tokens-per-micro-batch"} & set(self.flags)
        return self.flags if given else (*_micro_batch(1), *self.flags)

    @property
    def one_rank(self) -> "Layout":
        """What it is compared with: the same problem on one rank in float32, nothing split or shared or recomputed."""
        return Layout("one-rank", 1, SHARE_NONE + (GPU_FLOAT32 if self.gpus else ()), self.problem, self.gpus)


TP2 = ("--tensor-model-parallel-size", "2")
TP4 = ("--tensor-model-parallel-size", "4")
PP2 = ("--pipeline-model-parallel-size", "2")
PP4 = ("--pipeline-model-parallel-size", "4")
CP2 = ("--context-parallel-size", "2")
CP4 = ("--context-parallel-size", "4")
VPP = ("--num-layers-per-virtual-pipeline-stage", "1")
COUNT_ENDS = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
GROUPS_OF_FOUR = ("--microbatch-group-size-per-virtual-pipeline-stage", "4")
SP = ("--sequence-parallel",)
DISTRIBUTED = ("--use-distributed-optimizer",)
OVERLAP_REDUCE = ("--overlap-grad-reduce",)
OVERLAP = (*OVERLAP_REDUCE, "--overlap-param-gather")
SHARE_NONE = ("--amopo-share-prefixes", "none")
SHARE_RESPONSES = ("--amopo-share-prefixes", "responses")
FULL_RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
BF16 = ("--bf16",)
# Transformer Engine multiplies float32 matrices in TF32; Megatron's own layers don't.
GPU_FLOAT32 = ("--transformer-impl", "local")

BF16_WEIGHTS = Problem(bf16_weights=True)


def _micro_batch(size: int) -> tuple[str, ...]:
    return ("--micro-batch-size", str(size))


def _recompute(module: str) -> tuple[str, ...]:
    return ("--recompute-granularity", "selective", "--recompute-modules", module)


#: On the CPU, over gloo. Four ranks at most: each holds Megatron in memory.
CPU_LAYOUTS = (
    # One kind of parallelism at a time.
    Layout("one-rank", 1),
    Layout("tp2", 2, TP2),
    Layout("tp4", 4, TP4),
    Layout("tp2-sp", 2, TP2 + SP),
    Layout("tp4-sp", 4, TP4 + SP),
    Layout("pp2", 2, PP2),
    Layout("pp4", 4, PP4),
    Layout("pp2-vpp2", 2, PP2 + VPP),
    Layout("cp2", 2, CP2),
    Layout("cp4", 4, CP4),
    Layout("cp4-fewer-key-value-heads", 4, CP4, Problem(key_value_heads=2)),
    Layout("dp2", 2),
    Layout("dp4", 4),
    Layout("dp2-overlap-reduce", 2, OVERLAP_REDUCE),
    Layout("dp2-distributed-optimizer", 2, DISTRIBUTED),
    Layout("dp2-distributed-optimizer-overlap-reduce", 2, DISTRIBUTED + OVERLAP_REDUCE),
    Layout("dp4-distributed-optimizer-overlap-both", 4, DISTRIBUTED + OVERLAP),
    # Pipelines whose stages or schedules are cut otherwise.
    Layout("pp2-first-stage-of-one-layer", 2, (*PP2, "--decoder-first-pipeline-num-layers", "1")),
    Layout("pp2-last-stage-of-three-layers", 2, (*PP2, "--decoder-last-pipeline-num-layers", "3")),
    Layout("pp2-embedding-and-loss-as-layers", 2, PP2 + COUNT_ENDS),
    Layout("pp2-vpp2-stages-by-hand", 2, (*PP2, "--pipeline-model-parallel-layout", "Et|t|t|tL")),
    Layout("pp2-vpp2-groups-of-four", 2, PP2 + VPP + GROUPS_OF_FOUR),
    Layout("pp2-vpp2-warmup-overlap", 2, (*PP2, *VPP, *GROUPS_OF_FOUR, "--overlap-p2p-communication-warmup-flush")),
    # What prefixes are computed once: all layouts but these share all that can be shared (a tree).
    Layout("share-none-dp2", 2, SHARE_NONE),
    Layout("share-responses", 1, SHARE_RESPONSES),
    Layout("share-none-tp2-sp", 2, SHARE_NONE + TP2 + SP),
    Layout("share-responses-cp2-dp2", 4, SHARE_RESPONSES + CP2),
    Layout("nothing-in-common-cp2", 2, CP2, Problem(shared_question=False)),
    # Micro-batches and recomputation.
    Layout("micro-batch-2", 1, _micro_batch(2)),
    Layout("micro-batch-8", 1, _micro_batch(8)),
    Layout("tokens-per-micro-batch-dp2", 2, ("--amopo-max-tokens-per-micro-batch", "500")),
    Layout("full-recompute", 1, FULL_RECOMPUTE),
    Layout("selective-recompute", 1, _recompute("core_attn")),
    Layout("selective-recompute-mlp-tp2-sp", 2, TP2 + SP + _recompute("mlp")),
    Layout("tp2-full-recompute-activations-split", 2, (*TP2, *FULL_RECOMPUTE, "--distribute-saved-activations")),
    # Mixed.
    Layout("tp2-pp2", 4, TP2 + PP2),
    Layout("tp2-sp-pp2-full-recompute", 4, TP2 + SP + PP2 + FULL_RECOMPUTE),
    Layout("tp2-sp-dp2-distributed-optimizer", 4, TP2 + SP + DISTRIBUTED),
    Layout("tp2-cp2", 4, TP2 + CP2),
    Layout("tp2-cp2-fewer-key-value-heads", 4, TP2 + CP2, Problem(key_value_heads=2)),
    Layout("tp2-sp-cp2-full-recompute", 4, TP2 + SP + CP2 + FULL_RECOMPUTE),
    Layout("pp2-cp2", 4, PP2 + CP2),
    Layout("cp2-dp2", 4, CP2),
    Layout("cp2-dp2-distributed-optimizer", 4, CP2 + DISTRIBUTED),
    Layout("tp2-dp2-distributed-optimizer-overlap-both", 4, TP2 + DISTRIBUTED + OVERLAP),
    Layout("pp2-dp2", 4, PP2),
    Layout("pp2-dp2-distributed-optimizer-overlap-both", 4, PP2 + DISTRIBUTED + OVERLAP),
    Layout("pp2-vpp2-dp2-distributed-optimizer-overlap-both", 4, PP2 + VPP + DISTRIBUTED + OVERLAP),
    Layout("pp2-vpp2-dp2-param-gather-not-aligned", 4, (*PP2, *VPP, *DISTRIBUTED, *OVERLAP, "--no-align-param-gather")),
    Layout("pp2-vpp2-dp2-micro-batch-2", 4, PP2 + VPP + _micro_batch(2)),
    # Other models and objectives.
    Layout("untied-one-rank", 1, problem=Problem(tied=False)),
    Layout("untied-tp2-sp-pp2", 4, TP2 + SP + PP2, Problem(tied=False)),
    Layout("untied-tp2-cp2", 4, TP2 + CP2, Problem(tied=False)),
    Layout("untied-dp2-distributed-optimizer-overlap-both", 2, DISTRIBUTED + OVERLAP, Problem(tied=False)),
    Layout("qwen3-tp2-sp", 2, TP2 + SP, Problem(family="qwen3")),
    Layout("qwen3-untied-pp2-cp2", 4, PP2 + CP2, Problem(family="qwen3", tied=False)),
    Layout("llama-tp2-pp2", 4, TP2 + PP2, Problem(family="llama")),
    Layout("mistral-tp2", 2, TP2, Problem(family="mistral", tied=False)),
    Layout("orpo-tp2", 2, TP2, Problem(pairwise="orpo")),
    Layout("orpo-cp2-dp2", 4, CP2, Problem(pairwise="orpo")),
    Layout("dpo-tp2-cp2", 4, TP2 + CP2, Problem(pairwise="dpo")),
    Layout("dpo-pp2-dp2-distributed-optimizer", 4, PP2 + DISTRIBUTED, Problem(pairwise="dpo")),
    Layout("modpo-tp2-cp2", 4, TP2 + CP2, Problem(pairwise="modpo")),
    Layout("modpo-pp2-dp2", 4, PP2, Problem(pairwise="modpo")),
    Layout("ipo-tp2-sp", 2, TP2 + SP, Problem(pairwise="ipo")),
    Layout("sft-uniform-pp2", 2, PP2, Problem(pairwise="sft", weighting="uniform")),
    Layout("simpo-mean-cp2", 2, CP2, Problem(weighting="mean")),
    Layout("simpo-from-scores-tp2-pp2", 4, TP2 + PP2, Problem(weighting="from-scores")),
    # Numbers of dimensions; all others above have three.
    Layout("1-dimension-tp2", 2, TP2, Problem(dimensions=1)),
    Layout("2-dimensions-pp2", 2, PP2, Problem(dimensions=2)),
    Layout("4-dimensions-dp2", 2, (), Problem(dimensions=4)),
    Layout("5-dimensions-tp2-cp2", 4, TP2 + CP2, Problem(dimensions=5)),
    Layout("6-dimensions-tp2-pp2", 4, TP2 + PP2, Problem(dimensions=6)),
    # Half precision, against the same references in full precision.
    Layout("bf16-tp2-sp", 2, BF16 + TP2 + SP, BF16_WEIGHTS),
    Layout(
        "bf16-tp2-sp-dp2-reduced-in-bf16", 4, (*BF16, *TP2, *SP, *DISTRIBUTED, "--grad-reduce-in-bf16"), BF16_WEIGHTS
    ),
)

#: On GPUs, over NCCL; run as far as there are GPUs for.
GPU_LAYOUTS = (
    Layout("gpu-one-rank", 1, GPU_FLOAT32, gpus=True),
    Layout("gpu-full-recompute", 1, GPU_FLOAT32 + FULL_RECOMPUTE, gpus=True),
    Layout("gpu-micro-batch-8", 1, GPU_FLOAT32 + _micro_batch(8), gpus=True),
    Layout("gpu-bf16", 1, BF16, BF16_WEIGHTS, gpus=True),
    Layout("gpu-bf16-share-none", 1, BF16 + SHARE_NONE, BF16_WEIGHTS, gpus=True),
    Layout("gpu-bf16-micro-batch-8", 1, BF16 + _micro_batch(8), BF16_WEIGHTS, gpus=True),
    Layout("gpu-bf16-untied", 1, BF16, Problem(tied=False, bf16_weights=True), gpus=True),
    Layout("gpu-tp2", 2, GPU_FLOAT32 + TP2, gpus=True),
    Layout("gpu-pp2", 2, GPU_FLOAT32 + PP2, gpus=True),
    Layout("gpu-cp2", 2, GPU_FLOAT32 + CP2, gpus=True),
    Layout("gpu-dp2-distributed-optimizer-overlap-both", 2, GPU_FLOAT32 + DISTRIBUTED + OVERLAP, gpus=True),
    Layout("gpu-bf16-tp2-sp", 2, BF16 + TP2 + SP, BF16_WEIGHTS, gpus=True),
    Layout("gpu-bf16-tp2-sp-pp2", 4, BF16 + TP2 + SP + PP2, BF16_WEIGHTS, gpus=True),
    Layout("gpu-bf16-tp2-sp-cp2", 4, BF16 + TP2 + SP + CP2, BF16_WEIGHTS, gpus=True),
    Layout("gpu-bf16-tp2-sp-dp2-overlap-both", 4, BF16 + TP2 + SP + DISTRIBUTED + OVERLAP, BF16_WEIGHTS, gpus=True),
    Layout("gpu-bf16-tp2-sp-pp2-cp2", 8, BF16 + TP2 + SP + PP2 + CP2, BF16_WEIGHTS, gpus=True),
)

LAYOUTS = CPU_LAYOUTS + GPU_LAYOUTS
