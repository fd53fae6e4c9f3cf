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
from megatron_amopo.data.groups import Sharing, TokenizedGroup


@contextlib.contextmanager
def process_group() -> Iterator[dist.ProcessGroup]:
    """All ranks of the job as one gloo group."""
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def loaded_model(
    mcore: Path, *, tp: int = 1, sequence_parallel: bool = False, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Any, int]]:
    """The model of a converted checkpoint, on all ranks of the job, and the rows of its vocabulary without padding."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    from megatron_amopo import device
    from megatron_amopo.checkpoint.families import megatron_arguments, rope_scaling
    from megatron_amopo.checkpoint.hf import read_config
    from megatron_amopo.model.builder import ModelShape, build_model, transformer_config

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
            yield model, shape["vocab_size"]
        finally:
            parallel_state.destroy_model_parallel()


def packed_logps(
    mcore: Path,
    batches: list[list[TokenizedGroup]],
    *,
    tp: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    sharing: Sharing = "tree",
    pad_to_multiple_of: int | None = None,
    padding_id: int = 0,
) -> list[Tensor]:
    """``forward_logps`` of each micro-batch under the weights of a converted checkpoint; one ``[N]`` tensor per
    micro-batch.
    """
    from megatron_amopo.model.builder import forward_logps

    results = []
    with loaded_model(mcore, tp=tp, sequence_parallel=sequence_parallel, dtype=dtype) as (model, vocab_size):
        for groups in batches:
            noise = torch.zeros(len(groups), len(groups[0].prompts), 2)
            multiple = pad_to_multiple_of or 2 * tp
            batch = pack(groups, noise, [True] * len(groups), sharing=sharing, pad_to_multiple_of=multiple)
            batch.input_ids[:, batch.num_tokens :] = padding_id
            with torch.no_grad():
                results.append(forward_logps(model, batch, vocab_size=vocab_size, buffer_bytes=2**14))
    return results


def text_logits(mcore: Path, token_ids: Tensor) -> Tensor:
    """``forward_logits`` of one text ``[T]`` under the weights of a converted checkpoint: ``[T, vocabulary]``."""
    from megatron_amopo.model.builder import forward_logits

    with loaded_model(mcore) as (model, vocab_size), torch.no_grad():
        return forward_logits(model, token_ids, vocab_size=vocab_size)
