"""What a model's parameters are called on both sides, and how their rows correspond: the only file that knows a family.

Takes the fields of a Hugging Face `config.json`; gives the Megatron arguments of the same shape (`megatron_arguments`),
and the table of parameters (`parameter_table`) by which the converter reads and writes. Nothing here touches a file or
a device.

One rule covers every parameter of a decoder. A Megatron tensor is made of one or several Hugging Face tensors, its
*pieces*. All are cut along their rows into the same number of *blocks*; Megatron's rows are block 0 of every piece,
then block 1 of every piece, and so on:

    linear_qkv  = q, k, v     blocks = query groups: [q heads of group 0, k 0, v 0, q heads of group 1, k 1, v 1, ...]
    linear_fc1  = gate, up    blocks = 1:            [gate, up]
    all others  = themselves  blocks = 1

Layers are stacked: `decoder.layers.mlp.linear_fc2.weight` is [L, H, F], as Megatron's `torch_dist` checkpoints hold it,
and the norms in front of linear_qkv and linear_fc1 carry the names that Transformer Engine's fused layers give them,
whichever layer specification runs.

To add a family: an entry in FAMILIES, made of parameters, of the Megatron arguments that it fixes, and of a check of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_amopo.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor: its name, with `{layer}` where it repeats, and the dimension that its rows run over."""

    name: str
    rows: str


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the pieces that it is made of; dimensions by name, see `_dimensions`."""

    megatron: str
    pieces: tuple[Piece, ...]
    columns: str | None = None
    """Dimension of the columns; None for a vector."""
    blocks: str = "one"
    """Dimension that counts the blocks into which the rows of all pieces are cut."""
    untied_only: bool = False
    """Absent where the output layer is the embedding."""


@dataclass(frozen=True)
class Parameter:
    """A Rule with numbers: one parameter of one model."""

    megatron: str
    layers: int | None
    """L where Megatron stacks the parameter over layers, None where it exists once."""
    pieces: tuple[tuple[str, tuple[int, ...]], ...]
    """Hugging Face name (with `{layer}` where stacked) and shape, in Megatron's order."""
    blocks: int
    padded: bool
    """Whether Megatron may have appended rows: those of the vocabulary, up to a multiple of 128 x TP."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one layer's tensor in Megatron: [rows of all pieces, columns] or [rows]."""
        return (sum(shape[0] for _, shape in self.pieces), *self.pieces[0][1][1:])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the Megatron checkpoint: with the layers in front where stacked."""
        return self.shape if self.layers is None else (self.layers, *self.shape)

    @property
    def layer_numbers(self) -> Sequence[int | None]:
        """What `hf_names` is asked with: every layer, or only None for a parameter that exists once."""
        return (None,) if self.layers is None else range(self.layers)

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        """Names of the pieces in `layer` (None for a parameter that exists once)."""
        return tuple(name.format(layer=layer) for name, _ in self.pieces)

    def join(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """One layer's Megatron tensor, `shape`, from its Hugging Face pieces."""
        if len(pieces) == 1:
            return pieces[0].contiguous()
        columns = self.shape[1:]
        blocks = [piece.reshape(self.blocks, -1, *columns) for piece in pieces]
        return torch.cat(blocks, dim=1).reshape(self.shape)

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The Hugging Face pieces, contiguous, of one layer's Megatron tensor: the inverse of `join`."""
        rows = [shape[0] // self.blocks for _, shape in self.pieces]
        parts = tensor.reshape(self.blocks, sum(rows), *self.shape[1:]).split(rows, dim=1)
        return tuple(part.reshape(shape).contiguous() for part, (_, shape) in zip(parts, self.pieces, strict=True))


@dataclass(frozen=True)
class Family:
    """An architecture as `config.json` names it."""

    architecture: str
    rules: tuple[Rule, ...]
    arguments: Mapping[str, Any]
    """Megatron arguments that every model of the family has, beside those of `_decoder_arguments`."""
    check: Callable[[Mapping[str, Any]], None]
    """Raises CheckpointError for a config value that only this family has and that isn't supported."""


# The modules of a decoder layer in the order in which transformers defines them: its state dictionaries, and so the
# shards of # the folders that it saves, follow it.
_HF_LAYER_ORDER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)

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


def hf_shapes(table: Sequence[Parameter]) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model and its shape, in the order of transformers' state dictionary."""
    shapes = {
        name: shape
        for parameter in table
        for layer in parameter.layer_numbers
        for name, (_, shape) in zip(parameter.hf_names(layer), parameter.pieces, strict=True)
    }
    layers = max(parameter.layers or 0 for parameter in table)
    modules = [f"model.layers.{layer}.{module}" for layer in range(layers) for module in _HF_LAYER_ORDER]
    names = [
        f"{module}.{kind}"
        for module in ("model.embed_tokens", *modules, "model.norm", "lm_head")
        for kind in ("weight", "bias")
    ]
    ordered = {name: shapes[name] for name in names if name in shapes}
    assert len(ordered) == len(shapes), f"_HF_LAYER_ORDER lacks {sorted(set(shapes) - set(ordered))[0]}"
    return ordered


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
