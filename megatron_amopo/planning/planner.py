"""From a model, data and GPUs to the layouts that can be run, the quickest first, and the reasons against the others.

Layouts are enumerated, not searched: tensor and context parallelism in powers of two within a node's size, every number
of pipeline stages that divides GPUs and layers (embedding and loss counted as layers or not), every number of model
chunks, and each way to recompute.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_amopo.checkpoint.families import SequenceLimit
from megatron_amopo.planning.efficiency import DEFAULT, Efficiency
from megatron_amopo.planning.hardware import GIB, Gpu
from megatron_amopo.planning.layout import RECOMPUTES, Layout, Options
from megatron_amopo.planning.memory import RankMemory, host_bytes, rank_memory
from megatron_amopo.planning.refusals import Refusal, refusals, sequence_refusal
from megatron_amopo.planning.sizes import ModelSizes
from megatron_amopo.planning.timing import StepTime, TimeModel
from megatron_amopo.planning.work import MicroBatch, Records, StepWork

_POWERS = tuple(2**exponent for exponent in range(11))

#: Model chunks beyond this many save less of the pipeline's bubble than their transfers cost.
_MOST_CHUNKS = 16

#: Estimates that differ by less say nothing about which is quicker.
_ALIKE = 0.01

#: Of layouts that are estimated to be slower than the quickest by no more, the one with the most memory to spare is
#: recommended: that much of an estimate of time is uncertain, and a run that is out of memory ends.
CLOSE = 0.05


@dataclass(frozen=True)
class Fixed:
    """What the user has decided; None leaves it open."""

    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    chunks: int | None = None
    recompute: str | None = None
    sequence_parallel: bool = True


@dataclass(frozen=True)
class Estimate:
    """One layout that nothing speaks against; times in seconds, memory in bytes."""

    layout: Layout
    time: StepTime
    memory: tuple[RankMemory, ...]  # by pipeline stage
    work: StepWork
    records_per_second: float
    model_flops_per_gpu: float  # FLOP/s, see :func:`model_flops`
    host_memory: float  # of a rank

    @property
    def fullest(self) -> int:
        """The pipeline stage whose ranks need the most memory."""
        return max(self.layout.stages, key=lambda stage: self.memory[stage].total)

    @property
    def peak_memory(self) -> float:
        return self.memory[self.fullest].total


@dataclass(frozen=True)
class Plan:
    """What came of it."""

    fitting: tuple[Estimate, ...]  # the quickest first
    too_large: tuple[Estimate, ...]  # the smallest first
    refused: tuple[tuple[Refusal, int], ...]  # reason and how many layouts it is of, the commonest first
    considered: int


@dataclass(frozen=True)
class Question:
    """What is planned for."""

    sizes: ModelSizes
    limit: SequenceLimit
    records: Records
    longest_sequence: int  # tokens of prompt and response
    gpu: Gpu
    gpus: int
    options: Options
    fixed: Fixed = Fixed()
    headroom: float = 0.05  # share of the GPU's memory that an estimate must leave free
    efficiency: Efficiency = DEFAULT

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that a layout may take."""
        return self.gpu.memory_bytes * (1 - self.headroom)


def plan(question: Question) -> Plan:
    """All layouts of the question's GPUs, estimated or refused."""
    fitting: list[Estimate] = []
    too_large: list[Estimate] = []
    reasons, considered = Counter[Refusal](), 0
    of_data = sequence_refusal(question.longest_sequence, question.limit)
    for layout in candidates(question):
        considered += 1
        against = list(refusals(question.sizes, question.gpu, layout, question.options, question.gpus))
        against += [of_data] if of_data is not None else []
        if against:
            reasons.update(set(against))
            continue
        estimated = estimate(question, layout)
        (fitting if estimated.peak_memory <= question.usable_memory else too_large).append(estimated)
    return Plan(
        fitting=tuple(sorted(fitting, key=lambda one: one.time.total)),
        too_large=tuple(sorted(too_large, key=lambda one: one.peak_memory)),
        refused=tuple(reasons.most_common()),
        considered=considered,
    )


def candidates(question: Question) -> Iterator[Layout]:
    """Layouts to look at. What the user has fixed is looked at even where it doesn't divide the GPUs or the layers, for
    the reason why not; then ``dp`` is what remains of a division, at least 1."""
    fixed, gpus = question.fixed, question.gpus
    within_node = [size for size in _POWERS if size <= min(gpus, question.gpu.per_node)]
    for tp in [fixed.tp] if fixed.tp else within_node:
        for cp in [fixed.cp] if fixed.cp else [size for size in within_node if gpus % (tp * size) == 0] or [1]:
            for pp, count_ends in _pipelines(question, inner=tp * cp):
                layers = (question.sizes.layers + 2 * count_ends) // pp
                for chunks in [fixed.chunks] if fixed.chunks else _chunks(layers, pp):
                    for recompute in RECOMPUTES:
                        if fixed.recompute in (None, recompute):
                            yield Layout(
                                tp=tp, cp=cp, dp=max(1, gpus // (tp * cp * pp)), pp=pp, chunks=chunks,
                                count_ends=count_ends, recompute=recompute, sequence_parallel=fixed.sequence_parallel,
                            )  # fmt: skip


def estimate(question: Question, layout: Layout) -> Estimate:
    """Time and memory of a layout that can be run."""
    sizes, options = question.sizes, question.options
    work = question.records.step(global_batch=options.global_batch, micro_batch=options.micro_batch, dp=layout.dp)
    time = TimeModel(sizes, question.gpu, layout, options, efficiency=question.efficiency).step(work)
    flops = model_flops(sizes, work.mean) * work.micro_batches / (layout.tp * layout.cp * layout.pp)
    return Estimate(
        layout=layout,
        time=time,
        memory=tuple(rank_memory(sizes, layout, options, work, stage) for stage in layout.stages),
        work=work,
        records_per_second=options.global_batch / time.total,
        model_flops_per_gpu=flops / time.total,
        host_memory=host_bytes(sizes, layout, options),
    )


def model_flops(sizes: ModelSizes, batch: MicroBatch) -> float:
    """Operations that the model's mathematics needs for a micro-batch, forward and backward: 6 per token and weight of
    the layers' products, 3 · 4 per pair and attention channel, 6 per row and output weight; nothing twice."""
    layers = 6 * batch.tokens * sizes.layers * sizes.layer_linear_weights
    attention = 3 * 4 * batch.pairs * sizes.layers * sizes.query
    return layers + attention + 6 * batch.rows * sizes.vocabulary * sizes.hidden


def distinct(estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """One estimate for each way to split the model, in the order given: the plainest of those that are as quick as its
    quickest but for a percent, which is less than these estimates know."""
    by_split: dict[tuple[int, ...], list[Estimate]] = {}
    for one in estimates:
        by_split.setdefault((one.layout.tp, one.layout.cp, one.layout.pp, one.layout.dp), []).append(one)
    chosen = []
    for variants in by_split.values():
        quickest = min(one.time.total for one in variants)
        alike = [one for one in variants if one.time.total <= quickest * (1 + _ALIKE)]
        chosen.append(min(alike, key=_plainness))
    return tuple(sorted(chosen, key=lambda one: one.time.total))


def ranked(estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """The :func:`distinct` ones, the recommended first: of those within :data:`CLOSE` of the quickest, the one that
    takes the least memory. The others follow, the quickest first."""
    found = distinct(estimates)
    if not found:
        return ()
    close = [one for one in found if one.time.total <= found[0].time.total * (1 + CLOSE)]
    recommended = min(close, key=lambda one: one.peak_memory)
    return recommended, *(one for one in found if one is not recommended)


def shortage(plan: Plan, question: Question) -> str | None:
    """By how much the smallest layout is too large; None where none was only too large."""
    if not plan.too_large:
        return None
    smallest = plan.too_large[0]
    return (
        f"the smallest layout ({smallest.layout}, recompute {smallest.layout.recompute}) needs "
        f"{smallest.peak_memory / GIB:.1f} GiB per GPU; of {question.gpu.name}'s {question.gpu.memory_bytes / GIB:.0f} "
        f"GiB, {question.usable_memory / GIB:.1f} GiB may be used"
    )


def _plainness(one: Estimate) -> tuple[int, bool, int, float]:
    layout = one.layout
    return RECOMPUTES.index(layout.recompute), layout.count_ends, layout.chunks, one.peak_memory


def _pipelines(question: Question, *, inner: int) -> Iterator[tuple[int, bool]]:
    """Numbers of stages that divide the GPUs and the layers, without and with the ends counted."""
    layers, gpus, fixed = question.sizes.layers, question.gpus, question.fixed.pp
    for pp in [fixed] if fixed else range(1, min(max(gpus // inner, 1), layers) + 1):
        if fixed is None and pp > 1 and gpus % (inner * pp):
            continue
        with_ends = pp > 1 and (layers + 2) % pp == 0
        if layers % pp == 0 or (fixed and not with_ends):
            yield pp, False
        if with_ends:
            yield pp, True


def _chunks(layers_of_stage: int, pp: int) -> list[int]:
    if pp == 1 or not layers_of_stage:
        return [1]
    return [chunks for chunks in range(1, min(layers_of_stage, _MOST_CHUNKS) + 1) if layers_of_stage % chunks == 0]
