"""The model families: what their `config.json` says and which parameters they have. The only file that knows a family.

Takes the fields of a Hugging Face `config.json`; gives the Megatron arguments of the same shape (`megatron_arguments`),
the scaling of the rotary embedding (`rope_scaling`), the longest sequence (`longest_sequence`), and the table of
parameters (`parameter_table`) by which the converter reads and writes. Nothing here touches a file or a device.

To add a family: an entry in FAMILIES. It is made of parameters, of the Megatron arguments that it fixes, and of the
fields of config.json that it has beside those of every decoder. Fields that no list names are refused, so a model that
differs from its family in a way that isn't known here can't slip through.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_amopo.checkpoint.config_fields import check_fields, check_fixed, flag, number, rope, whole_number
from megatron_amopo.checkpoint.parameters import Parameter, Piece, Rule
from megatron_amopo.errors import CheckpointError
from megatron_amopo.model.rotary import Llama3Scaling


@dataclass(frozen=True)
class IgnoredTensors:
    """Tensors, by a pattern of their whole names, that are left out, and why that changes nothing."""

    pattern: str
    why: str


@dataclass(frozen=True)
class Family:
    """An architecture as `config.json` names it."""

    architecture: str
    model_type: str
    rules: tuple[Rule, ...]
    """In the order in which transformers defines the modules: its files follow it."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Megatron arguments that every model of the family has, where they differ from those of `_decoder_arguments`."""
    fields: frozenset[str] = frozenset()
    """Fields of config.json that `check` and `length_fields` understand."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that may have one value only; missing or null, they have it."""
    stated: tuple[str, ...] = ("num_key_value_heads",)
    """Fields that must be there, null perhaps: for a missing one transformers puts in a number of its own."""
    default_rotary_base: int | None = None
    """The base where config.json states none; None refuses that."""
    length_fields: Mapping[str, str] = field(default_factory=lambda: {"max_position_embeddings": ""})
    """The smallest of these, as far as they are set, is the longest sequence that the model takes here; and why."""
    check: Callable[[Mapping[str, Any]], None] | None = None
    """Raises CheckpointError for a combination of fields that isn't supported."""
    ignored: tuple[IgnoredTensors, ...] = ()
    """Tensors that old files hold although nothing needs them."""


@dataclass(frozen=True)
class SequenceLimit:
    """How many tokens a sequence may have, and the field of config.json that says so. As text, for messages."""

    tokens: int
    field: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.tokens} ({self.field} in config.json{self.why and ': '}{self.why})"


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


def _decoder(*extra_of_attention: Rule) -> tuple[Rule, ...]:
    """Parameters of a decoder of Llama's kind (pre-norm blocks, grouped-query attention, SwiGLU), and what a family has
    beside them in its attention."""
    return (
        _EMBEDDING,
        _qkv("weight", "hidden"),
        _one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "query"),
        *extra_of_attention,
        Rule(
            "decoder.layers.mlp.linear_fc1.weight",
            (
                Piece("model.layers.{layer}.mlp.gate_proj.weight", "ffn"),
                Piece("model.layers.{layer}.mlp.up_proj.weight", "ffn"),
            ),
            "hidden",
        ),
        _one("mlp.linear_fc2.weight", "mlp.down_proj.weight", "hidden", "ffn"),
        _one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "hidden"),
        _one("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "hidden"),
        _FINAL_NORM,
        _OUTPUT,
    )


_QK_NORMS = (
    _one("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head"),
    _one("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head"),
)

# Fields that every decoder has; `_decoder_arguments`, `_check` and `rope` read them.
_DECODER_FIELDS = frozenset(
    """
    architectures head_dim hidden_size initializer_range intermediate_size max_position_embeddings model_type
    num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta
    tie_word_embeddings vocab_size
    """.split()  # noqa: SIM905
)
_DECODER_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
_QWEN_WINDOW_FIELDS = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})
_ROTARY_BUFFERS = IgnoredTensors(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "rotary frequencies follow from config.json"
)


def _check_qwen_windows(config: Mapping[str, Any]) -> None:
    """Qwen slides the windows of the layers that `layer_types` names or, in files of older releases, of those from
    `max_window_layers` on, where `use_sliding_window` says so."""
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        raise CheckpointError(f"config.json: layer_types {layer_types!r} is no list of names")
    other_layers = sorted(set(layer_types) - {"full_attention"})
    if other_layers:
        raise CheckpointError(
            f"config.json: layer_types has {', '.join(other_layers)}: only full_attention is supported"
        )
    if not flag(config, "use_sliding_window") or config.get("sliding_window") is None or layer_types:
        return
    layers = whole_number(config, "num_hidden_layers")
    first = config.get("max_window_layers") and whole_number(config, "max_window_layers")
    if not first or first < layers:
        raise CheckpointError(
            f"config.json: use_sliding_window with max_window_layers {first} of {layers} layers: sliding-window "
            "attention is not supported"
        )


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "Qwen2ForCausalLM",
            "qwen2",
            _decoder(_qkv("bias", None)),
            arguments={"add_qkv_bias": True},
            fields=_QWEN_WINDOW_FIELDS,
            check=_check_qwen_windows,
        ),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            _decoder(*_QK_NORMS),
            arguments={"qk_layernorm": True},
            fields=_QWEN_WINDOW_FIELDS,
            fixed={"attention_bias": False},
            stated=("num_key_value_heads", "head_dim"),
            check=_check_qwen_windows,
        ),
        # Llama 2's published files state neither a base nor, the oldest, key and value heads.
        Family(
            "LlamaForCausalLM",
            "llama",
            _decoder(),
            fixed={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
            stated=(),
            default_rotary_base=10_000,
            ignored=(_ROTARY_BUFFERS,),
        ),
        # A window slides over every layer. Sequences that fit into it never notice, so it limits their length here.
        Family(
            "MistralForCausalLM",
            "mistral",
            _decoder(),
            fields=frozenset({"sliding_window"}),
            stated=("num_key_value_heads", "sliding_window"),
            length_fields={"max_position_embeddings": "", "sliding_window": "only within it, full attention is exact"},
            ignored=(_ROTARY_BUFFERS,),
        ),
    )
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
    _check(family, hf_config)
    return {**_decoder_arguments(family, hf_config), **family.arguments}


def rope_scaling(hf_config: Mapping[str, Any]) -> Llama3Scaling | None:
    """How config.json stretches the rotary embedding; None where it doesn't.

    The model takes this, not Megatron's `rope_scaling_factor`: Megatron knows the factor alone, and takes Llama 3.1's
    numbers for the rest.

    Raises:
        CheckpointError: it is of a kind that isn't supported.
    """
    return rope(hf_config, family_of(hf_config).default_rotary_base).scaling


def longest_sequence(hf_config: Mapping[str, Any]) -> SequenceLimit:
    """The longest sequence that is computed exactly: `max_position_embeddings`, or the sliding window where it is
    shorter. Within its window, attention is full attention.

    Raises:
        CheckpointError: a field is missing or isn't a number.
    """
    limits = [
        SequenceLimit(whole_number(hf_config, name), name, why)
        for name, why in family_of(hf_config).length_fields.items()
        if name == "max_position_embeddings" or hf_config.get(name) is not None
    ]
    return min(limits, key=lambda limit: limit.tokens)


def ignored_tensor(hf_config: Mapping[str, Any], name: str) -> str | None:
    """Why a tensor that isn't part of the model may be left out; None where it may not."""
    for tensors in family_of(hf_config).ignored:
        if re.fullmatch(tensors.pattern, name):
            return tensors.why
    return None


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The entry of FAMILIES for this config.json; CheckpointError where there is none."""
    architectures = hf_config.get("architectures")
    if not architectures or not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise CheckpointError("config.json: architectures is missing or no list of names: which family is this?")
    if len(architectures) > 1 or architectures[0] not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"config.json: architectures {', '.join(architectures)}: not supported; known: {known}")
    return FAMILIES[architectures[0]]


def parameter_table(hf_config: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """Every parameter of the model that config.json describes, in the order in which transformers defines the modules.

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
    return {_OUTPUT.pieces[0].name: _EMBEDDING.pieces[0].name} if flag(hf_config, "tie_word_embeddings") else {}


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


def _decoder_arguments(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a decoder of Llama's kind, names and defaults of config.json as transformers has them."""
    hidden = whole_number(config, "hidden_size")
    heads = whole_number(config, "num_attention_heads")
    groups = whole_number(config, "num_key_value_heads", default=heads)
    if heads % groups:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    rotary = rope(config, family.default_rotary_base)
    return {
        "num_layers": whole_number(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": whole_number(config, "intermediate_size"),
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": groups,
        "kv_channels": whole_number(config, "head_dim", default=hidden // heads),
        "vocab_size": whole_number(config, "vocab_size"),
        "max_position_embeddings": longest_sequence(config).tokens,
        "position_embedding_type": "rope",
        "rotary_base": rotary.base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        # What Megatron can say of a scaling; see `rope_scaling`. Its default factor is 8.
        "use_rope_scaling": rotary.scaling is not None,
        "rope_scaling_factor": rotary.scaling.factor if rotary.scaling is not None else 8.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": number(config, "rms_norm_eps"),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        # transformers 5 omits the field where it has the default, False.
        "untie_embeddings_and_output_weights": not flag(config, "tie_word_embeddings"),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": number(config, "initializer_range", default=0.02),
    }


def _check(family: Family, config: Mapping[str, Any]) -> None:
    """Refuse what would silently compute something else in Megatron."""
    if config.get("model_type") not in (None, family.model_type):
        raise CheckpointError(
            f"config.json: model_type {config['model_type']!r} contradicts architectures {family.architecture}, whose "
            f"model_type is {family.model_type!r}"
        )
    if config.get("quantization_config"):
        raise CheckpointError("config.json: quantization_config: quantized weights are not supported")
    for name in family.stated:
        if name not in config:
            raise CheckpointError(f"config.json: {name} is missing, and what it means then depends on the software")
    fixed = {**_DECODER_FIXED, **family.fixed}
    check_fixed(config, fixed)
    if family.check is not None:
        family.check(config)
    check_fields(config, _DECODER_FIELDS | family.fields | fixed.keys())
