"""Ours against the released trainer's step on the same records: checked to compute the same, then timed in turns.

A step is forward pass, loss and backward pass of all given records, micro-batch after micro-batch, gradients adding up.
The optimizer is left out on both sides: it is the same arithmetic over the same weights, once per global batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import batched
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.flops import StepFlops, packed_flops, padded_flops
from benchmarks.models import Models, ModelSlice, OurStep
from benchmarks.released import PaddedRows, ReleasedStep
from benchmarks.support import Samples, peak_extra_memory, time_interleaved
from megatron_amopo import device
from megatron_amopo.data.batching import pack
from megatron_amopo.data.groups import TokenizedGroup
from megatron_amopo.objectives.noise import record_noise

NOISE_SEED = 1
# Relative; of the loss and of the gradient's norm.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class ResultsDiffer(Exception):
    """The two steps don't compute the same, so comparing their speed would mean nothing."""


@dataclass(frozen=True)
class Side:
    """One of the two steps, measured."""

    loss: float
    gradient_norm: float
    flops: StepFlops
    extra_bytes: int
    seconds: Samples

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds.values}


@dataclass(frozen=True)
class Comparison:
    """Both steps on the same records."""

    num_records: int
    micro_batch_size: int
    tokens: int  # of ours
    head_rows: int  # of ours
    padded_tokens: int  # of the released step, all of them through the head
    ours: Side
    released: Side
    matmul_flops_per_second: Samples  # of a plain matrix product of a layer's shape, timed in the same rounds

    @property
    def flop_ratio(self) -> float:
        """By how much ours would be faster if time were floating-point operations alone."""
        return self.released.flops.total / self.ours.flops.total

    @property
    def speedup(self) -> Samples:
        """Records/s of ours over the released step's."""
        return self.released.seconds.per(self.ours.seconds)

    def records_per_second(self, side: Side) -> float:
        return self.num_records / side.seconds.median

    @property
    def flops_per_second(self) -> tuple[float, float]:
        """Floating-point operations per second of a whole step: ours, and the released one."""
        ours, released = (side.flops.total / side.seconds.median for side in (self.ours, self.released))
        return ours, released

    def as_json(self) -> dict[str, Any]:
        """Everything measured."""
        return {
            "records": self.num_records,
            "micro_batch_size": self.micro_batch_size,
            "tokens": self.tokens,
            "head_rows": self.head_rows,
            "padded_tokens": self.padded_tokens,
            "ours": self.ours.as_json(),
            "released": self.released.as_json(),
            "matmul_flops_per_second": self.matmul_flops_per_second.values,
            "flop_ratio": self.flop_ratio,
            "speedup": self.speedup.values,
        }


class Contest:
    """The two steps on one set of records, each a function without arguments: ``ours`` and ``released``."""

    def __init__(
        self,
        models: Models,
        model_slice: ModelSlice,
        groups: Sequence[TokenizedGroup],
        dimensions: tuple[str, ...],
        micro_batch_size: int,
    ):
        here = device.current_device()
        self.models, self.model_slice = models, model_slice
        self.num_records, self.micro_batch_size = len(groups), micro_batch_size
        micro_batches = with_noise(groups, micro_batch_size)
        self.packed = [pack(part, noise, [True] * len(part)).to(here) for part, noise in micro_batches]
        self.padded = [PaddedRows.of(part, noise, here) for part, noise in micro_batches]
        our_step, released_step = OurStep(models, dimensions), ReleasedStep(models.transformers)

        def ours() -> Tensor:
            return run_step(models.megatron, [partial(our_step, batch) for batch in self.packed]) / len(groups)

        def released() -> Tensor:
            losses = [lambda rows=rows: released_step(rows) * len(rows.noise) for rows in self.padded]
            return run_step(models.transformers, losses) / len(groups)

        self.ours, self.released = ours, released

    def check(self, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
        """Losses and norms of gradients, by side.

        Raises:
            ResultsDiffer: the two sides' are not the same.
        """
        losses = {"ours": self.ours().item(), "released": self.released().item()}
        norms = {"ours": _gradient_norm(self.models.megatron), "released": _gradient_norm(self.models.transformers)}
        for what, found in (("loss", losses), ("norm of the gradient", norms)):
            if not abs(found["ours"] / found["released"] - 1) <= TOLERANCES[dtype]:
                raise ResultsDiffer(f"{what}: ours {found['ours']:.8g}, released {found['released']:.8g}")
        return losses, norms

    def extra_bytes(self) -> dict[str, int]:
        """Peak memory beyond the weights, by side."""
        result = {}
        for name, step in (("ours", self.ours), ("released", self.released)):
            for model in (self.models.megatron, self.models.transformers):
                model.zero_grad(set_to_none=True)
            result[name] = peak_extra_memory(step)
        return result


def plain_matmul(
    config: Mapping[str, Any], tokens: int, dtype: torch.dtype, flops: float
) -> tuple[Callable[[], None], float]:
    """The first product of a layer's MLP on so many tokens, as often as about ``flops`` operations take; and how many
    it really takes.
    """
    here = device.current_device()
    inputs = torch.randn(tokens, config["hidden_size"], device=here, dtype=dtype)
    weight = torch.randn(2 * config["intermediate_size"], config["hidden_size"], device=here, dtype=dtype)
    output = inputs @ weight.t()
    once = 2.0 * tokens * weight.numel()
    times = max(1, round(flops / once))

    def multiply() -> None:
        for _ in range(times):
            torch.mm(inputs, weight.t(), out=output)

    return multiply, times * once


def compare(contests: Mapping[str, Contest], repetitions: int, *, dtype: torch.dtype) -> dict[str, Comparison]:
    """Check every contest, measure its memory, then time all of them in the same rounds.

    Raises:
        ResultsDiffer: the two steps of a contest don't compute the same.
    """
    candidates: dict[str, Callable[[], Any]] = {}
    facts = {}
    for name, contest in tqdm(contests.items(), desc="checking that both compute the same", unit="case"):
        checked, extra_bytes = contest.check(dtype), contest.extra_bytes()
        flops = {
            "ours": packed_flops(contest.model_slice, contest.packed),
            "released": padded_flops(contest.model_slice, contest.padded),
        }
        tokens = contest.packed[0].num_tokens
        matmul, matmul_flops = plain_matmul(contest.model_slice.config, tokens, dtype, flops["ours"].total / 4)
        facts[name] = (*checked, extra_bytes, flops, matmul_flops)
        candidates |= {
            f"ours/{name}": contest.ours,
            f"released/{name}": contest.released,
            f"matmul/{name}": matmul,
        }
    seconds = time_interleaved(candidates, repetitions)

    comparisons = {}
    for name, contest in contests.items():
        losses, norms, extra_bytes, flops, matmul_flops = facts[name]
        ours, released = (
            Side(losses[side], norms[side], flops[side], extra_bytes[side], seconds[f"{side}/{name}"])
            for side in ("ours", "released")
        )
        comparisons[name] = Comparison(
            num_records=contest.num_records,
            micro_batch_size=contest.micro_batch_size,
            tokens=sum(batch.num_tokens for batch in contest.packed),
            head_rows=sum(len(batch.targets) for batch in contest.packed),
            padded_tokens=sum(rows.input_ids.numel() for rows in contest.padded),
            ours=ours,
            released=released,
            matmul_flops_per_second=Samples(tuple(matmul_flops / s for s in seconds[f"matmul/{name}"].values)),
        )
    return comparisons


def with_noise(
    groups: Sequence[TokenizedGroup], micro_batch_size: int
) -> list[tuple[tuple[TokenizedGroup, ...], Tensor]]:
    """The groups in micro-batches, each with its groups' noise ``[G, D, 2]``."""
    return [
        (
            part,
            record_noise(NOISE_SEED, torch.tensor([g.record_id for g in part]), len(part[0].prompts), epoch=0),
        )
        for part in batched(groups, micro_batch_size)
    ]


def run_step(model: torch.nn.Module, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
    """The sum of the micro-batches' losses, their gradient left in ``model``."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device.current_device())
    for loss_of in losses:
        loss = loss_of()
        loss.backward()
        total += loss.detach()
    return total


def _gradient_norm(model: torch.nn.Module) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # Summed in float64: a float32 sum over millions of entries is only exact to some 1e-5.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.stack(norms).norm().item()
