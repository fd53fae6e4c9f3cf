"""What each rank does in tests/checkpoint/test_megatron_loader.py: load and save with Megatron, layout by layout.

Each rank compares what Megatron loaded with its part of the Hugging Face tensors, cut by the plain code in
`expected_part`, then spoils the rows of vocabulary padding and saves, so that the test can export what Megatron wrote.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_amopo.checkpoint.tensor_files import dtype_name


@dataclass(frozen=True)
class Model:
    """What distinguishes a model here: whether it ties its embeddings, and what a family has of its own."""

    family: str
    tied: bool
    dtype: torch.dtype
    qkv_bias: bool = False
    qk_norms: bool = False
    head: int = 8  # HIDDEN / HEADS; else said in config.json


MODELS = {
    f"{family}-{'tied' if tied else 'untied'}-{dtype_name(dtype)}": Model(family, tied, dtype, **own)
    for family, own in {
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norms": True, "head": 16},
        "llama": {},
        "mistral": {},
    }.items()
    for tied in (True, False)
    for dtype in (torch.bfloat16, torch.float32)
}
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
# Saving takes most of the time, so it is done where it differs most: tied embeddings have a copy on the last stage.
SAVED = (
    ("qwen2-tied-float32", 1, 2),
    ("qwen2-untied-bfloat16", 2, 2),
    ("qwen3-untied-bfloat16", 2, 2),
    ("llama-tied-bfloat16", 2, 2),
    ("mistral-untied-float32", 2, 1),
)
RANKS = 4
HIDDEN, FFN, HEADS, GROUPS = 64, 96, 8, 2
PADDED_VOCABULARY = 256


def run(rank: int, work: Path, vocabulary: int, layers: int) -> None:
    """Load and save under each layout. `work` holds NAME/hf and NAME/megatron for each of MODELS."""
    from megatron_amopo import device

    device.prepare()
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=RANKS)
    for tp, pp in LAYOUTS:
        parallel_state.initialize_model_parallel(tp, pp)
        for name, kind in MODELS.items():
            model = _load_and_compare(work / name, tp, pp, kind, layers)
            if (name, tp, pp) in SAVED:
                _save(model, work / name / f"saved-tp{tp}-pp{pp}" / "iter_0000005", tp, vocabulary)
        parallel_state.destroy_model_parallel()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _load_and_compare(folder: Path, tp: int, pp: int, kind: Model, layers: int) -> Any:
    """The GPTModel that Megatron loaded from what we wrote."""
    from megatron.core import dist_checkpointing, parallel_state

    from tests.support.checkpoints import load_tensors

    model = _model(tp, pp, kind, layers)
    request: dict[str, Any] = {"model": model.sharded_state_dict()}
    if (tp, pp) == (1, 1):
        request["transformer_engine"] = _extra_states(layers)
    loaded = dist_checkpointing.load(request, str(folder / "megatron" / "release"))
    assert isinstance(loaded["args"], argparse.Namespace)
    assert loaded["args"].num_layers == layers
    model.load_state_dict(loaded["model"], strict=True)

    tensors = load_tensors(folder / "hf")
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    first_layer = parallel_state.get_pipeline_model_parallel_rank() * (layers // pp)
    for name, parameter in model.named_parameters():
        expected = expected_part(name, tensors, tp, tp_rank, first_layer, kind.head)
        assert torch.equal(parameter, expected.float()), f"{folder.name} TP {tp} PP {pp}: {name}"
    return model


def _save(model: Any, target: Path, tp: int, vocabulary: int) -> None:
    """Save as Megatron does, with something in the padded rows and with an optimizer's tensors."""
    from megatron.core import dist_checkpointing, parallel_state

    first_row = parallel_state.get_tensor_model_parallel_rank() * PADDED_VOCABULARY // tp
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                parameter[max(vocabulary - first_row, 0) :] = 7.0
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    moments = _renamed(model.sharded_state_dict(), "optimizer.state.exp_avg.")
    dist_checkpointing.save(
        {"model": model.sharded_state_dict(), "optimizer": moments, "iteration": 5}, str(target), async_strategy="mcore"
    )


def _model(tp: int, pp: int, kind: Model, layers: int) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=kind.head,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=kind.qkv_bias,
        qk_layernorm=kind.qk_norms,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=kind.qk_norms),
        vocab_size=PADDED_VOCABULARY,
        max_sequence_length=128,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=kind.tied,
    )


def _extra_states(layers: int) -> dict[str, Any]:
    """What a model of Transformer Engine layers asks for, and one of local layers doesn't: the state of attention and
    norm."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    key = "decoder.layers.self_attention.core_attention._extra_state"
    replica = torch.distributed.get_rank()
    requests = {f"layer {layer}": ShardedObject(key, None, (layers,), (layer,), replica) for layer in range(layers)}
    requests["final"] = ShardedObject("decoder.final_layernorm._extra_state", None, (1,), (0,), replica)
    return requests


def _renamed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors of a sharded state dictionary under other names, as an optimizer's moments are stored."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    state = {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}
    add_prefix_for_sharding(state, prefix)
    return state


def expected_part(
    name: str, tensors: dict[str, torch.Tensor], tp: int, tp_rank: int, first_layer: int, head: int
) -> torch.Tensor:
    """One rank's part of a Megatron parameter (local layer specification), cut from Hugging Face tensors step by
    step."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.shape[0] // tp
        return tensor[tp_rank * size : (tp_rank + 1) * size]

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.shape[1] // tp
        return tensor[:, tp_rank * size : (tp_rank + 1) * size]

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return rows(torch.cat([tensor, tensor.new_zeros(PADDED_VOCABULARY - tensor.shape[0], tensor.shape[1])]))

    if name == "embedding.word_embeddings.weight":
        return padded(tensors["model.embed_tokens.weight"])
    if name == "output_layer.weight":  # tied models have a copy of the embedding on the last stage
        return padded(tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
    if name == "decoder.final_layernorm.weight":
        return tensors["model.norm.weight"]
    _, _, number, part = name.split(".", 3)
    layer = f"model.layers.{int(number) + first_layer}"
    if part == "input_layernorm.weight":
        return tensors[f"{layer}.input_layernorm.weight"]
    if part == "pre_mlp_layernorm.weight":
        return tensors[f"{layer}.post_attention_layernorm.weight"]
    if part in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"):
        return tensors[f"{layer}.self_attn.{part.removeprefix('self_attention.')[0]}_norm.weight"]
    if part == "self_attention.linear_proj.weight":
        return columns(tensors[f"{layer}.self_attn.o_proj.weight"])
    if part == "mlp.linear_fc2.weight":
        return columns(tensors[f"{layer}.mlp.down_proj.weight"])
    if part == "mlp.linear_fc1.weight":
        return torch.cat([rows(tensors[f"{layer}.mlp.{half}_proj.weight"]) for half in ("gate", "up")])
    kind = part.removeprefix("self_attention.linear_qkv.")
    query, key, value = (tensors[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv")
    heads_per_group = HEADS // GROUPS
    parts = []
    for group in range(tp_rank * GROUPS // tp, (tp_rank + 1) * GROUPS // tp):
        parts.append(query[group * heads_per_group * head : (group + 1) * heads_per_group * head])
        parts.append(key[group * head : (group + 1) * head])
        parts.append(value[group * head : (group + 1) * head])
    return torch.cat(parts)
