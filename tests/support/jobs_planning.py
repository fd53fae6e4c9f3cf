"""Jobs for :class:`megatron_amopo.certification.ranks.RankPool` by which tests hold the planner against Megatron."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_amopo.data.batching import pack
from megatron_amopo.data.groups import TokenizedGroup
from megatron_amopo.data.segments import PackedSegments
from tests.support.jobs_model import process_group


class _OneKernel(torch.autograd.Function):
    """Attention that keeps what a variable-length kernel keeps: query, gathered keys and values, output, log-sum-exp;
    the CPU's backend makes tensors for each branch instead. There is no way back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments) -> Tensor:
        from megatron_amopo.model.attention import per_branch_attention

        context = per_branch_attention(q, k, v, segments)
        log_sum_exp = q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k[segments.key_index], v[segments.key_index], context, log_sum_exp)
        return context


def _one_kernel(q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, *, scale: float | None = None) -> Tensor:
    return _OneKernel.apply(q, k, v, segments)


def saved_bytes_per_layer(
    arguments: dict[str, Any], groups: list[TokenizedGroup], tp: int, options: dict[str, Any]
) -> tuple[float, int]:
    """Bytes that autograd keeps of one more layer for the backward pass, on this rank, in float32; and the packed
    tokens, padding included.

    Storage is counted once however many views of it are kept; weights aren't counted.

    Args:
        arguments: of ``megatron_arguments``.
        groups: one micro-batch.
        tp: tensor parallelism, with sequence parallelism where it is more than 1.
        options: further fields of Megatron's configuration.
    """
    from megatron.core import parallel_state, tensor_parallel

    from megatron_amopo import device
    from megatron_amopo.model import attention
    from megatron_amopo.model.builder import ModelShape, build_model, forward_logps, transformer_config

    batch = pack(
        groups, torch.zeros(len(groups), len(groups[0].prompts), 2), [True] * len(groups), pad_to_multiple_of=tp
    )
    padded = -(-arguments["vocab_size"] // (128 * tp)) * 128 * tp
    kept: dict[int, int] = {}
    with process_group():
        with device.pretended_cuda():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        try:
            for layers in (1, 3):
                config = transformer_config(
                    {**arguments, "num_layers": layers},
                    tensor_model_parallel_size=tp,
                    sequence_parallel=tp > 1,
                    **options,
                )
                model = build_model(config, ModelShape.of(arguments, None, padded_vocab_size=padded)).train()
                weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
                storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

                def keep(
                    tensor: torch.Tensor,
                    storages: dict[int, torch.UntypedStorage] = storages,
                    weights: set[int] = weights,
                ) -> torch.Tensor:
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in weights:
                        storages[storage.data_ptr()] = storage
                    return tensor

                with (
                    patch.object(attention, "select_backend", lambda *_: _one_kernel),
                    torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                ):
                    logps = forward_logps(model, batch, vocab_size=arguments["vocab_size"])
                    kept[layers] = sum(storage.nbytes() for storage in storages.values())
                del logps
        finally:
            parallel_state.destroy_model_parallel()
    return (kept[3] - kept[1]) / 2, batch.input_ids.shape[1]
