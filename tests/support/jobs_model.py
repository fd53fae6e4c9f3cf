"""Jobs for :class:`megatron_amopo.certification.ranks.RankPool` that compute with the model or its head directly,
without a training run.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amopo.data.batching import pack
from megatron_amopo.data.groups import TokenizedGroup


@contextlib.contextmanager
def process_group() -> Iterator[dist.ProcessGroup]:
    """All ranks of the job as one gloo group."""
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def packed_logps(
    mcore: Path,
    batches: list[list[TokenizedGroup]],
    *,
    tp: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """``forward_logps`` of each micro-batch under the weights of a converted checkpoint; one ``[N]`` tensor per
    micro-batch.
    """
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    from megatron_amopo import device
    from megatron_amopo.checkpoint.families import megatron_arguments, rope_scaling
    from megatron_amopo.checkpoint.hf import read_config
    from megatron_amopo.model.builder import ModelShape, build_model, forward_logps, transformer_config

    hf_config = read_config(mcore / "hf")
    shape = megatron_arguments(hf_config)
    with process_group():
        with device.pretended_cuda():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        try:
            config = transformer_config(
                shape, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel, params_dtype=dtype
            )
            multiple = 128 * tp
            padded = -(-shape["vocab_size"] // multiple) * multiple
            model = build_model(config, ModelShape.of(shape, rope_scaling(hf_config), padded_vocab_size=padded))
            state = model.sharded_state_dict()
            loaded = dist_checkpointing.load(
                {k: v for k, v in state.items() if "_extra_state" not in k}, str(mcore / "release")
            )
            model.load_state_dict(loaded, strict=False)
            results = []
            for groups in batches:
                noise = torch.zeros(len(groups), len(groups[0].prompts), 2)
                batch = pack(groups, noise, [True] * len(groups), pad_to_multiple_of=2 * tp)
                with torch.no_grad():
                    results.append(forward_logps(model, batch, vocab_size=shape["vocab_size"], chunk_rows=37))
            return results
        finally:
            parallel_state.destroy_model_parallel()


def head_and_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lengths: Tensor,
    noise: Tensor,
    incoming: Tensor,
    vocab_size: int,
    chunk_rows: int,
) -> dict[str, Any]:
    """``response_logps`` and the group loss on this rank's slice of ``weight``, with the gradients of Σ incoming ·
    logps and Σ loss.
    """
    from megatron_amopo.model import response_logps
    from megatron_amopo.objectives import amopo_loss
    from megatron_amopo.objectives.statistics import response_statistics

    with process_group() as group:
        rows = weight.shape[0] // group.size()
        hidden = hidden.clone().requires_grad_()
        local = weight[group.rank() * rows : (group.rank() + 1) * rows].clone().requires_grad_()

        def logps() -> Tensor:
            return response_logps(hidden, local, targets, tp_group=group, vocab_size=vocab_size, chunk_rows=chunk_rows)

        values = logps()
        logps_gradients = torch.autograd.grad(values, (hidden, local), incoming.to(values.dtype))
        stats = response_statistics(logps(), lengths)
        loss = amopo_loss(stats.sum_logps, lengths, stats.prob_mean, stats.prob_std, noise).loss
        loss_incoming = torch.linspace(0.5, -2.0, loss.shape[0], dtype=loss.dtype)
        loss_gradients = torch.autograd.grad(loss, (hidden, local), loss_incoming)
        return {
            "logps": values.detach(),
            "loss": loss.detach(),
            "logps_gradients": logps_gradients,
            "loss_gradients": loss_gradients,
        }


def collectives_of_the_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, list]:
    """Which collectives one forward and backward pass of the head issues: (operation, number of elements)."""
    from megatron_amopo.model import response_logps

    calls: dict[str, list] = {"forward": [], "backward": []}
    with process_group() as group:
        rows = weight.shape[0] // group.size()
        hidden = hidden.clone().requires_grad_()
        local = weight[group.rank() * rows : (group.rank() + 1) * rows].clone().requires_grad_()
        original, phase = dist.all_reduce, "forward"

        def counting(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
            calls[phase].append((str(op).rsplit(".", 1)[-1], tuple(tensor.shape)))
            return original(tensor, op=op, **options)

        dist.all_reduce = counting
        try:
            values = response_logps(hidden, local, targets, tp_group=group, chunk_rows=5)
            phase = "backward"
            values.sum().backward()
        finally:
            dist.all_reduce = original
    return calls
