"""Jobs for :class:`megatron_amopo.certification.ranks.RankPool` about the fused head: alone, and in training runs whose
data parallelism or kernels are replaced by stricter or plainer ones.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amopo.certification.observed_run import TrainedRun, train
from tests.support.jobs_model import process_group


@contextlib.contextmanager
def sharded_weight(weight: Tensor) -> Iterator[tuple[dist.ProcessGroup, Tensor]]:
    """All ranks as one tensor-parallel group, and this rank's rows of the weight."""
    with process_group() as group:
        rows = weight.shape[0] // group.size()
        yield group, weight[group.rank() * rows : (group.rank() + 1) * rows].clone().requires_grad_()


def head_and_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lengths: Tensor,
    noise: Tensor,
    incoming: Tensor,
    vocab_size: int,
    blocks: tuple[int, int],
) -> dict[str, Any]:
    """``response_logps`` and the group loss on this rank's slice of ``weight``, with the gradients of Σ incoming ·
    logps and Σ loss.
    """
    from megatron_amopo.model import response_logps
    from megatron_amopo.model.logprobs import Blocks
    from megatron_amopo.objectives import Pairs, amopo_loss
    from megatron_amopo.objectives.statistics import response_statistics

    with sharded_weight(weight) as (group, local):
        hidden = hidden.clone().requires_grad_()

        def logps() -> Tensor:
            return response_logps(hidden, local, targets, tp_group=group, vocab_size=vocab_size, blocks=Blocks(*blocks))

        values = logps()
        logps_gradients = torch.autograd.grad(values, (hidden, local), incoming.to(values.dtype))
        stats = response_statistics(logps(), lengths)
        loss = amopo_loss(Pairs(stats.sum_logps, lengths, stats.prob_mean, stats.prob_std, noise)).loss
        loss_incoming = torch.linspace(0.5, -2.0, loss.shape[0], dtype=loss.dtype)
        loss_gradients = torch.autograd.grad(loss, (hidden, local), loss_incoming)
        return {
            "logps": values.detach(),
            "loss": loss.detach(),
            "logps_gradients": logps_gradients,
            "loss_gradients": loss_gradients,
        }


def collectives_of_the_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, list]:
    """Which collectives one forward and backward pass of the head issues: (operation, shape). All of them, by whatever
    function: each passes torch's dispatcher.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from megatron_amopo.model import response_logps
    from megatron_amopo.model.logprobs import Blocks

    calls: dict[str, list] = {"forward": [], "backward": []}
    phase, reduction, original = "forward", "", dist.all_reduce

    # The dispatcher's operator doesn't tell which reduction it is.
    def named(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        nonlocal reduction
        reduction = str(op).rsplit(".", 1)[-1]
        try:
            return original(tensor, op=op, **options)
        finally:
            reduction = ""

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                name = reduction or func.overloadpacket.__name__
                shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                calls[phase].append((name, *shapes))
            return func(*args, **(kwargs or {}))

    with sharded_weight(weight) as (group, local), patch.object(dist, "all_reduce", named), Recorded():
        hidden = hidden.clone().requires_grad_()
        values = response_logps(hidden, local, targets, tp_group=group, blocks=Blocks(5, 50))
        phase = "backward"
        values.sum().backward()
    return calls


def train_with_late_weights(flags: list[str], *, outside_the_call: bool = False) -> TrainedRun:
    """A training run under ``--overlap-param-gather`` whose gathers do nothing before they are waited for: until then,
    the weights that other ranks have updated are NaN.

    Args:
        flags: of the training command.
        outside_the_call: read the output weight outside its layer's call, so that nobody waits for it.
    """
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    from megatron_amopo.model.response_head import ResponseHead

    gather = BucketGroup.start_param_sync

    class LateGather:
        def __init__(self, group: Any):
            self.group = group

        def wait(self) -> None:
            self.group.param_gather_handle = None
            gather(self.group, force_sync=True)

    def start_late(self: Any, force_sync: bool = False) -> None:
        if force_sync:
            gather(self, force_sync=True)
            return
        for bucket in self.buckets:
            shards = shard_buffer(bucket.param_data, self.intra_distributed_optimizer_instance_size)
            for rank, shard in enumerate(shards):
                if rank != self.intra_distributed_optimizer_instance_rank:
                    shard.fill_(float("nan"))
        self.param_gather_handle, self.param_gather_dispatched = LateGather(self), True

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(BucketGroup, "start_param_sync", start_late))
        if outside_the_call:
            patches.enter_context(patch.object(ResponseHead, "__call__", ResponseHead.forward))
        return train(flags)


@dataclass(frozen=True)
class FusedRun:
    """A training run, and how often a weight's gradient went into ``main_grad`` on this rank."""

    run: TrainedRun
    by_kernel: int
    by_head: int


def train_with_fused_weight_gradients(flags: list[str], *, fused: bool = True) -> FusedRun:
    """A training run under gradient accumulation fusion, apex' kernel being replaced by a plain one.

    Args:
        flags: of the training command.
        fused: False has the kernel at hand and doesn't ask for it.
    """
    from megatron.core.tensor_parallel import layers

    from megatron_amopo import device
    from megatron_amopo.model import logprobs

    kernel_calls = 0

    def add_weight_gradient(inputs: Tensor, grad_outputs: Tensor, main_grad: Tensor) -> None:
        nonlocal kernel_calls
        kernel_calls += 1
        main_grad.addmm_(grad_outputs.t().to(main_grad.dtype), inputs.to(main_grad.dtype))

    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient)
    with (
        patch.object(layers, "_grad_accum_fusion_available", True),
        patch.object(layers, "fused_weight_gradient_mlp_cuda", kernels, create=True),
        patch.dict(device.CPU_ARGUMENTS, gradient_accumulation_fusion=fused),
        patch.object(logprobs, "_placeholder", wraps=logprobs._placeholder) as placeholder,
    ):
        run = train(flags)
    return FusedRun(run, by_kernel=kernel_calls, by_head=placeholder.call_count)
