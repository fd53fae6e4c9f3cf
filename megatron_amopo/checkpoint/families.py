"""The model families: what their `config.json` says and which parameters they have. The only file that knows a family.

Takes the fields of a Hugging Face `config.json`; gives the Megatron arguments of the same shape (`megatron_arguments`),
and the table of parameters (`parameter_table`) by which the converter reads and writes. Nothing here touches a file or
a device.

To add a family: an entry in FAMILIES, made of parameters, of the Megatron arguments that it fixes, and of a check of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_amopo.checkpoint.parameters import Parameter, Piece, Rule
from megatron_amopo.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """An architecture as `config.json` names it."""

    architecture: str
    rules: tuple[Rule, ...]
    arguments: Mapping[str, Any]
    """Megatron arguments that every model of the family has, beside those of `_decoder_arguments`."""
    check: Callable[[Mapping[str, Any]], None]
    """Raises CheckpointError for a config value that only this family has and that isn't supported."""


_EMBEDDING = Rule("embedding.word_embeddings.weight", (Piece("model.embed_tokens.weight", "vocab"),), "hidden")
_OUTPUT = Rule("output_layer.weight", (Piece("lm_head.weight", "vocab"),), "hidden", untied_only=True)
_FINAL_NORM = Rule("decoder.final_layernorm.weight", (Piece("model.norm.weight", "hidden"),))
_QKV_PIECES = (("q", "query"), ("k", "key"), ("v", "key"))


def _qkv(what: str, columns: str | None) -> Rule:
    """linear_qkv's weight or bias: each query group's query heads, then its key head, then its value head."""
    pieces = tuple(
        Piece(f"model.layers.{{layer}}.self_attn.{letter}_proj.{what}", rows) for letter, rows in _QKV_PIECES
    )
    return Rule(f"decoder.layers.self_attention.linear_qkv.{what}", pieces, columns, blocks="groups")


def _one(megatron: str, hf: str, rows: str, columns: str | None = None) -> Rule:
    """A parameter of each layer that both sides store alike."""
    return Rule(f"decoder.layers.{megatron}", (Piece(f"model.layers.{{layer}}.{hf}", rows),), columns)


# What all decoders of Llama's kind share: pre-norm blocks, grouped-query attention, SwiGLU.
_DECODER = (
    _EMBEDDING,
    _one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "hidden"),
    _qkv("weight", "hidden"),
    _one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "query"),
    _one("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "hidden"),
    Rule(
        "decoder.layers.mlp.linear_fc1.weight",
        (
            Piece("model.layers.{layer}.mlp.gate_proj.weight", "ffn"),
            Piece("model.layers.{layer}.mlp.up_proj.weight", "ffn"),
        ),
        "hidden",
    ),
    _one("mlp.linear_fc2.weight", "mlp.down_proj.weight", "hidden", "ffn"),
    _FINAL_NORM,
    _OUTPUT,
)


def _check_qwen2(config: Mapping[str, Any]) -> None:
    """Qwen2 slides the windows of layers from `max_window_layers` on, but only where `use_sliding_window` says so."""
    layers = _whole_number(config, "num_hidden_layers")
    if not config.get("use_sliding_window") or config.get("sliding_window") is None or "layer_types" in config:
        return  # layer_types, where present, decides instead: see _check_decoder
    if config.get("max_window_layers", layers) < layers:
        raise CheckpointError(
            f"config.json: use_sliding_window with max_window_layers {config['max_window_layers']} of {layers} layers: "
            "sliding-window attention is not supported"
        )


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (Family("Qwen2ForCausalLM", (*_DECODER, _qkv("bias", None)), {"add_qkv_bias": True}, _check_qwen2),)
}


def megatron_arguments(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of the shape that a Hugging Face `config.json` describes.

    Args:
        hf_config: the fields of config.json, as transformers 4 or 5 writes it.

    Returns:
        Attribute names of Megatron's argument namespace (`layernorm_epsilon` is what `--norm-epsilon` sets) and their
        values. `vocab_size` is the number of rows of the embedding, before Megatron's padding. Set them before the
        arguments are validated.

    Raises:
        CheckpointError: a field is missing, contradicts another, or says something that isn't supported; the message
            names it.
    """
    family = family_of(hf_config)
    _check_decoder(hf_config)
    family.check(hf_config)
    return {**_decoder_arguments(hf_config), **family.arguments}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The entry of FAMILIES for this config.json; CheckpointError where there is none."""
    architectures = hf_config.get("architectures")
    if not architectures:
        raise CheckpointError("config.json: architectures is missing or empty: which family is this?")
    if len(architectures) > 1 or architectures[0] not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"config.json: architectures {', '.join(architectures)}: not supported; known: {known}")
    return FAMILIES[architectures[0]]


def parameter_table(hf_config: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """Every parameter of the model that config.json describes, in the order in which a forward pass meets them.

    Raises:
        CheckpointError: as `megatron_arguments`.
    """
    arguments = megatron_arguments(hf_config)
    sizes = _dimensions(arguments)
    parameters = []
    for rule in family_of(hf_config).rules:
        if rule.untied_only and not arguments["untie_embeddings_and_output_weights"]:
            continue
        columns = () if rule.columns is None else (sizes[rule.columns],)
        parameters.append(
            Parameter(
                megatron=rule.megatron,
                layers=arguments["num_layers"] if "{layer}" in rule.pieces[0].name else None,
                pieces=tuple((piece.name, (sizes[piece.rows], *columns)) for piece in rule.pieces),
                blocks=sizes[rule.blocks],
                padded=rule.pieces[0].rows == "vocab",
            )
        )
    return tuple(parameters)


def tied_copies(hf_config: Mapping[str, Any]) -> dict[str, str]:
    """Tensors that a folder may hold although the model ties them to another: name -> the tensor that must equal it."""
    return {_OUTPUT.pieces[0].name: _EMBEDDING.pieces[0].name} if hf_config.get("tie_word_embeddings", False) else {}


def _dimensions(arguments: Mapping[str, Any]) -> dict[str, int]:
    """The named sizes that Rules speak of."""
    head = arguments["kv_channels"]
    return {
        "one": 1,
        "groups": arguments["num_query_groups"],
        "hidden": arguments["hidden_size"],
        "ffn": arguments["ffn_hidden_size"],
        "query": arguments["num_attention_heads"] * head,
        "key": arguments["num_query_groups"] * head,
        "head": head,
        "vocab": arguments["vocab_size"],
    }


def _decoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a decoder of Llama's kind, names and defaults of config.json as transformers has them."""
    hidden = _whole_number(config, "hidden_size")
    heads = _whole_number(config, "num_attention_heads")
    groups = _whole_number(config, "num_key_value_heads", default=heads)
    if heads % groups:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return {
        "num_layers": _whole_number(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": _whole_number(config, "intermediate_size"),
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": groups,
        "kv_channels": _whole_number(config, "head_dim", default=hidden // heads),
        "vocab_size": _whole_number(config, "vocab_size"),
        "max_position_embeddings": _whole_number(config, "max_position_embeddings"),
        "position_embedding_type": "rope",
        "rotary_base": _rotary_base(config),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": _number(config, "rms_norm_eps"),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        # transformers 5 omits the field where it has the default, False.
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": _number(config, "initializer_range", default=0.02),
    }


def _check_decoder(config: Mapping[str, Any]) -> None:
    """Refuse what would silently compute something else in Megatron."""
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act {config['hidden_act']!r}: only 'silu' is supported")
    if config.get("quantization_config"):
        raise CheckpointError("config.json: quantization_config: quantized weights are not supported")
    other_layers = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if other_layers:
        raise CheckpointError(
            f"config.json: layer_types has {', '.join(other_layers)}: only full_attention is supported"
        )
    # transformers 4 writes rope_scaling; 5 writes rope_parameters, which hold the base, too.
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"config.json: {field} of type {kind!r}: rope scaling is not supported")
        unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta"})
        if unknown:
            raise CheckpointError(f"config.json: {field} has {', '.join(unknown)}: not supported")


def _rotary_base(config: Mapping[str, Any]) -> int:
    """The base of the rotary embedding, in either spelling; Megatron's --rotary-base is a whole number."""
    nested = (config.get("rope_parameters") or {}).get("rope_theta")
    top = config.get("rope_theta")
    if nested is not None and top is not None and nested != top:
        raise CheckpointError(f"config.json: rope_theta is {top}, but rope_parameters.rope_theta is {nested}")
    theta = nested if nested is not None else top
    if theta is None:
        raise CheckpointError("config.json: rope_theta is missing (neither at the top nor in rope_parameters)")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0 or theta != int(theta):
        raise CheckpointError(f"config.json: rope_theta {theta!r} is not a positive whole number")
    return int(theta)


def _whole_number(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise CheckpointError(f"config.json: {field} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {field} {value!r} is not a positive whole number")
    return value


def _number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise CheckpointError(f"config.json: {field} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"config.json: {field} {value!r} is not a positive number")
    return float(value)
