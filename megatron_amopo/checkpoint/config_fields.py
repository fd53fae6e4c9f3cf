"""Reading `config.json` field by field: a value is understood, or refused by its name.

Takes the fields of a Hugging Face `config.json` and gives numbers, flags and the settings of the rotary embedding. What
a family does with them is in `families.py`. transformers 4 and 5 spell the rotary embedding in two ways; both are read
here, and nowhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_amopo.errors import CheckpointError
from megatron_amopo.model.rotary import Llama3Scaling

#: Fields that don't change what a causal language model computes, whatever they say: where it comes from, how
#: transformers loads it and what it returns beside the logits, token ids, defaults of text generation, and labels of
#: classification heads. Most are written by older releases of transformers for every model.
BOOKKEEPING = frozenset(
    """
    dtype tokenizer_class torch_dtype transformers_version unsloth_fixed unsloth_version
    chunk_size_feed_forward output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    tf_legacy_loss torchscript use_cache
    bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id pad_token_id sep_token_id
    unk_token_id
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences prefix remove_invalid_values repetition_penalty suppress_tokens
    temperature top_k top_p typical_p
    finetuning_task id2label label2id num_labels problem_type task_specific_params
    """.split()  # noqa: SIM905
)

_LARGEST = 2**63 - 1  # what Megatron and torch can hold
_ROPE_FIELDS = ("rope_scaling", "rope_parameters")
_LLAMA3 = tuple(field.name for field in fields(Llama3Scaling))


@dataclass(frozen=True)
class Rope:
    """The rotary embedding that config.json describes."""

    base: int
    """Megatron's --rotary-base is a whole number."""
    scaling: Llama3Scaling | None


def check_fields(config: Mapping[str, Any], understood: Collection[str]) -> None:
    """Refuse a field that says something and is neither understood nor known to be bookkeeping.

    Raises:
        CheckpointError: naming the field.
    """
    for field in sorted(config.keys() - BOOKKEEPING - set(understood)):
        value = config[field]
        unset = value is None or value is False or value in ("", [], {})
        if not unset and not field.startswith("_"):
            raise CheckpointError(
                f"config.json: {field} {value!r}: not understood; if it doesn't change what the model computes, remove "
                "it from config.json"
            )


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Refuse other values than those that `fixed` names; a missing or null field has the value there."""
    for field, value in fixed.items():
        if config.get(field) not in (None, value):
            raise CheckpointError(f"config.json: {field} {config[field]!r}: only {value!r} is supported")


def whole_number(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A positive whole number; missing and null mean the default, and are refused where there is none."""
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise CheckpointError(f"config.json: {field} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST:
        raise CheckpointError(f"config.json: {field} {value!r} is not a positive whole number below 2**63")
    return value


def number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """A finite number above 0; missing and null as in `whole_number`."""
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise CheckpointError(f"config.json: {field} is missing")
    if not _is_positive(value):
        raise CheckpointError(f"config.json: {field} {value!r} is not a finite number above 0")
    return float(value)


def _is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that a float can hold: Python's JSON has NaN, Infinity and endless digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def flag(config: Mapping[str, Any], field: str) -> bool:
    """True or false; missing and null mean false."""
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {field} {value!r} is neither true nor false")
    return bool(value)


def rope(config: Mapping[str, Any], default_base: int | None = None) -> Rope:
    """The rotary embedding, in either spelling.

    transformers 4 writes `rope_theta` and, where there is scaling, `rope_scaling`; 5 writes `rope_parameters` with
    everything.

    Raises:
        CheckpointError: the base is missing (and there is no default), the spellings contradict each other, or the
            scaling isn't Llama 3's.
    """
    scalings = [_scaling(field, config[field]) for field in _ROPE_FIELDS if config.get(field)]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise CheckpointError(
            f"config.json: rope_scaling {config['rope_scaling']} contradicts rope_parameters "
            f"{config['rope_parameters']}"
        )
    return Rope(_rotary_base(config, default_base), scalings[0] if scalings else None)


def _scaling(field: str, settings: Any) -> Llama3Scaling | None:
    """What `rope_scaling` or `rope_parameters` say beside the base."""
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"config.json: {field} {settings!r} is not an object")
    kind = settings.get("rope_type", settings.get("type", "default"))
    known = {"default": (), "llama3": _LLAMA3}
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            f"config.json: {field} of type {kind!r}: of rope scalings only 'llama3' is supported, which is Llama 3.1's"
        )
    unknown = sorted(settings.keys() - {"rope_type", "type", "rope_theta", *known[kind]})
    if unknown:
        raise CheckpointError(f"config.json: {field} has {', '.join(unknown)}: not supported")
    if not known[kind]:
        return None
    try:
        scaling = Llama3Scaling(
            factor=number(settings, "factor"),
            low_freq_factor=number(settings, "low_freq_factor"),
            high_freq_factor=number(settings, "high_freq_factor"),
            original_max_position_embeddings=whole_number(settings, "original_max_position_embeddings"),
        )
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("config.json: ", f"config.json: {field}.", 1)) from None
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise CheckpointError(f"config.json: {field} {asdict(scaling)}: low_freq_factor must be below high_freq_factor")
    return scaling


def _rotary_base(config: Mapping[str, Any], default: int | None) -> int:
    places = {"rope_theta": config.get("rope_theta")}
    places |= {f"{field}.rope_theta": (config.get(field) or {}).get("rope_theta") for field in _ROPE_FIELDS}
    said = {place: value for place, value in places.items() if value is not None}
    for place, value in said.items():
        if not _is_positive(value) or value != int(value) or value > _LARGEST:
            raise CheckpointError(f"config.json: {place} {value!r} is not a positive whole number below 2**63")
    if len(set(said.values())) > 1:
        raise CheckpointError("config.json: " + ", but ".join(f"{place} is {value}" for place, value in said.items()))
    theta = next(iter(said.values()), default)
    if theta is None:
        raise CheckpointError("config.json: rope_theta is missing (neither at the top nor in rope_parameters)")
    return int(theta)
