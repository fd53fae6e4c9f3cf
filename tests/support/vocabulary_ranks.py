"""What each rank does in tests/checkpoint/test_vocabulary.py: load, compare and save under a tensor parallelism of 1, 2
and 8, with the sizes that the training command computes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

TENSOR_PARALLEL = (1, 2, 8)
RANKS = 8
#: What is put into padded rows before they are saved: an export that kept any would show it.
PADDING = 7.0


def run(rank: int, work: Path, names: tuple[str, ...]) -> None:
    """Load and save ``names`` under each layout. ``work`` holds prepared data and, for each, NAME/hf and
    NAME/megatron; it gets NAME/saved-tpN.
    """
    from megatron_amopo import device

    device.prepare()
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=RANKS)
    for tp in TENSOR_PARALLEL:
        with device.pretended_cuda():
            parallel_state.initialize_model_parallel(tp)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        for name in names:
            _load_compare_and_save(work, work / name, tp)
        parallel_state.destroy_model_parallel()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _load_compare_and_save(work: Path, folder: Path, tp: int) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_amopo.model.builder import build_model
    from megatron_amopo.training.arguments import parse_arguments
    from tests.support.checkpoints import load_tensors

    sys.argv = [
        "train", "--amopo-data", str(work / "data"), "--pretrained-checkpoint", str(folder / "megatron"),
        "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-3", "--tensor-model-parallel-size", str(tp),
    ]  # fmt: skip
    args, config = parse_arguments()
    model = build_model(core_transformer_config_from_args(args), config.shape)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "megatron" / "release"))
    model.load_state_dict(loaded["model"])

    tensors = load_tensors(folder / "hf")
    rank = parallel_state.get_tensor_model_parallel_rank()
    hf_names = {"embedding.word_embeddings": "model.embed_tokens", "output_layer": "lm_head"}
    for name, parameter in model.named_parameters():
        hf_name = hf_names.get(name.removesuffix(".weight"))
        if hf_name is None:
            continue
        assert parameter.shape[0] * tp == config.shape.padded_vocab_size
        expected = tensors[f"{hf_name}.weight"]
        first = rank * parameter.shape[0]
        own = expected[first : first + parameter.shape[0]]
        assert torch.equal(parameter[: len(own)], own), f"TP {tp} rank {rank}: {name}"
        with torch.no_grad():
            parameter[len(own) :] = PADDING

    target = folder / f"saved-tp{tp}" / "iter_0000001"
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(target), async_strategy="mcore")
