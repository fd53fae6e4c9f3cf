"""From a Megatron configuration to the model that gives response log-probabilities; the only file that knows
``GPTModel``.

:func:`build_model` takes Megatron's ``TransformerConfig`` and a few sizes and gives a ``GPTModel`` whose layers attend
over packed groups and whose rotary embedding takes explicit positions. Training calls it by :func:`forward_logps`,
comparisons with other implementations by :func:`forward_logits`. Outside a training run :func:`transformer_config`
and :meth:`ModelShape.of` make the configuration that a training run takes from Megatron's arguments.

``GPTModel`` announces a successor, ``HybridModel``; megatron-core 0.19's has neither an output processor nor explicit
positions.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_amopo.data.batching import GroupBatch
from megatron_amopo.data.segments import Branch, PackedSegments
from megatron_amopo.model.attention import AUTO, PackedAttention
from megatron_amopo.model.logprobs import DEFAULT_BUFFER_BYTES
from megatron_amopo.model.norm import RMSNorm
from megatron_amopo.model.response_head import ResponseHead
from megatron_amopo.model.rotary import Llama3Scaling, PackedRotaryEmbedding
from megatron_amopo.model.swiglu import SwiGLU


@dataclass(frozen=True)
class ModelShape:
    """What a model needs beside Megatron's ``TransformerConfig``."""

    padded_vocab_size: int  # embedding rows over all tensor-parallel ranks, a multiple of their number
    max_position_embeddings: int
    rotary_base: float
    tied_embeddings: bool
    rope_scaling: Llama3Scaling | None = None

    @classmethod
    def of(
        cls, arguments: Mapping[str, Any], rope_scaling: Llama3Scaling | None, *, padded_vocab_size: int
    ) -> "ModelShape":
        """The shape that ``arguments`` and ``rope_scaling`` describe, both from the functions of these names in
        ``checkpoint/families.py`` (``megatron_arguments``): Megatron's arguments can't say all of a scaling.
        """
        return cls(
            padded_vocab_size=padded_vocab_size,
            max_position_embeddings=arguments["max_position_embeddings"],
            rotary_base=arguments["rotary_base"],
            tied_embeddings=not arguments["untie_embeddings_and_output_weights"],
            rope_scaling=rope_scaling,
        )


def transformer_config(arguments: Mapping[str, Any], **options: Any) -> TransformerConfig:
    """Megatron's configuration for computing with a model outside a training run, on the CPU: its own layers, nothing
    fused.

    Args:
        arguments: of :func:`megatron_amopo.checkpoint.families.megatron_arguments`; those that ``TransformerConfig``
            doesn't know are :class:`ModelShape`'s.
        options: further fields of ``TransformerConfig``: parallelism, precision.
    """
    known = {field.name for field in fields(TransformerConfig)}
    values: dict[str, Any] = {name: value for name, value in arguments.items() if name in known}
    if arguments["swiglu"]:
        values |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    values |= {
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        # As in training: packed rows differ in length, and the second is what the first asks of a configuration check.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
    }
    return TransformerConfig(**{**values, **options})


def build_model(
    config: TransformerConfig,
    shape: ModelShape,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    attention: str = AUTO,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """This rank's part of the model.

    Args:
        config: Megatron's configuration; ``transformer_impl`` chooses Transformer Engine or Megatron's own layers.
        shape: the rest of the sizes.
        pre_process, post_process: whether this pipeline stage holds the embedding and the output layer.
        attention: a backend of ``attention.py``, by name.
        vp_stage: virtual pipeline stage.
        pg_collection: process groups; None takes Megatron's global ones.
    """
    # Megatron hands explicit positions to the rotary embedding only of its multimodal kind. That embedding is replaced
    # below; the section sizes are a formality.
    config = copy(config)
    config.mrope_section = [config.kv_channels // 2, 0, 0]
    is_swiglu = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    if config.transformer_impl == "local" and is_swiglu and not config.bias_activation_fusion:
        # By this name Megatron's MLP asks the layer spec for its activation, whoever wrote it.
        config.use_te_activation_func = True
    model = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(
            config, partial(PackedAttention, backend=attention), vp_stage, pg_collection
        ),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="mrope",
        rotary_base=shape.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    if post_process:
        # GPTModel makes its output layer itself. The class has no state of its own, so the layer stays what it is.
        model.output_layer.__class__ = ResponseHead
    model.rotary_pos_emb = PackedRotaryEmbedding(config.kv_channels, shape.rotary_base, shape.rope_scaling)
    return model


def forward_logps(
    model: torch.nn.Module,
    batch: GroupBatch,
    *,
    vocab_size: int,
    buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    on_row_gradients: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Log-probabilities ``[N]`` of the batch's response tokens, float32; on an earlier pipeline stage the hidden states
    to hand on.

    Args:
        model: of :func:`build_model`, possibly wrapped (data parallelism, mixed precision).
        batch: on the model's device.
        vocab_size: rows of the vocabulary without padding.
        buffer_bytes: working memory for logits, see :func:`megatron_amopo.model.logprobs.plan_blocks`.
        on_row_gradients: see :meth:`ResponseHead.forward`.
    """
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        packed_seq_params=batch.segments,
        output_processor=partial(
            _response_head, vocab_size=vocab_size, buffer_bytes=buffer_bytes, on_row_gradients=on_row_gradients
        ),
        output_processor_context=batch,
    )


def forward_logits(model: torch.nn.Module, token_ids: Tensor, *, vocab_size: int) -> Tensor:
    """Logits ``[T, vocab_size]`` after each token of one text, float32, without the vocabulary's padding.

    Args:
        model: of :func:`build_model`, whole: neither pipeline- nor tensor-parallel.
        token_ids: ``[T]`` int64, on the model's device.
        vocab_size: rows of the vocabulary without padding.
    """
    length = len(token_ids)
    logits = model(
        input_ids=token_ids[None],
        position_ids=torch.arange(length, device=token_ids.device)[None],
        attention_mask=None,
        packed_seq_params=PackedSegments((Branch(0, length),), token_ids.device),
    )
    return logits[0, :, :vocab_size].float()


def _response_head(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: GroupBatch,
    vocab_size: int,
    buffer_bytes: int,
    on_row_gradients: Callable[[Tensor], None] | None,
    **_: Any,
) -> Tensor:
    """GPTModel's output processor: the call of the output layer, which GPTModel would make for logits."""
    return output_layer(
        hidden_states,
        output_weight,
        batch=context,
        vocab_size=vocab_size,
        buffer_bytes=buffer_bytes,
        on_row_gradients=on_row_gradients,
    )


def _layer_spec(
    config: TransformerConfig,
    core_attention: partial[PackedAttention],
    vp_stage: int | None,
    pg_collection: ProcessGroupCollection | None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Megatron's layers with our attention, and in the torch flavour our norm and activation, too."""
    if config.transformer_impl == "transformer_engine":
        submodules = get_gpt_layer_with_transformer_engine_submodules(qk_layernorm=config.qk_layernorm)
        submodules.self_attention.submodules.core_attention = core_attention
        return ModuleSpec(module=TransformerLayer, submodules=submodules)

    submodules = get_gpt_layer_local_submodules(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    submodules.self_attention.submodules.core_attention = core_attention
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    submodules.mlp.keywords["submodules"].activation_func = SwiGLU  # used where the configuration asks for it
    if config.qk_layernorm:
        submodules.self_attention.submodules.q_layernorm = RMSNorm
        submodules.self_attention.submodules.k_layernorm = RMSNorm
    layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
    pp_rank = None if pg_collection is None else pg_collection.pp.rank()
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
