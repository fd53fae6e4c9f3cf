"""The table of parameters and the Megatron arguments, against plain references, transformers and published facts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_amopo.checkpoint.families import (
    ignored_tensor,
    longest_sequence,
    megatron_arguments,
    parameter_table,
    rope_scaling,
    tied_copies,
)
from megatron_amopo.checkpoint.parameters import Parameter, hf_shapes
from megatron_amopo.errors import CheckpointError
from megatron_amopo.model.rotary import Llama3Scaling
from tests.support.published_configs import PUBLISHED, Published
from tests.support.shared import SHARED_DATA

REAL_CONFIGS = SHARED_DATA / "qwen2.5-configs"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# What json.loads gives for NaN and Infinity, and a whole number that no float can hold.
NAN, INF, HUGE = math.nan, math.inf, 10**400

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "max_window_layers": 2,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151,
}


# What each family has beside the fields of CONFIG that all have.
_OF_QWEN2 = {"max_window_layers", "sliding_window", "use_sliding_window"}
_SHARED = {name: value for name, value in CONFIG.items() if name not in _OF_QWEN2}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**CONFIG, "model_type": "qwen2"},
    "qwen3": {**CONFIG, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "llama": {**_SHARED, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1},
    "mistral": {**_SHARED, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32},
}


# Further sizes of published models: the fields in which a file differs from that of its smaller neighbour.
_QWEN3_4B = {"num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "max_window_layers": 36}
_QWEN3_14B = {
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_attention_heads": 40,
    "max_window_layers": 40,
}
_LLAMA2_13B = {
    "_name_or_path": "meta-llama/Llama-2-13b-hf",
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_LLAMA_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def resized(name: str, parameters: int, changes: dict[str, Any]) -> Published:
    """A published model of the same family, head and base as the one of that name."""
    known = PUBLISHED[name]
    return Published(parameters, known.head, known.rotary_base, {**known.config, **changes})


MODELS = {
    **PUBLISHED,
    "Qwen2-7B": Published(7_615_616_512, 128, 1_000_000, _QWEN2_7B),
    "Qwen3-1.7B": resized("Qwen3-0.6B", 1_720_574_976, {"hidden_size": 2048, "intermediate_size": 6144}),
    "Qwen3-4B": resized("Qwen3-0.6B", 4_022_468_096, {**_QWEN3_4B, "num_attention_heads": 32}),
    "Qwen3-14B": resized("Qwen3-8B", 14_768_307_200, _QWEN3_14B),
    "Llama-2-13b": resized("Llama-2-7b", 13_015_864_320, _LLAMA2_13B),
    "Llama-2-70b": resized("Llama-2-7b", 68_976_648_192, {**_LLAMA_70B, "_name_or_path": "meta-llama/Llama-2-70b-hf"}),
    "Llama-3.1-70B": resized("Llama-3.1-8B-Instruct", 70_553_706_496, {**_LLAMA_70B, "eos_token_id": 128001}),
}


def parameter(name: str, config: dict[str, Any] = CONFIG) -> Parameter:
    return next(p for p in parameter_table(config) if p.megatron.endswith(name))


def test_arguments_of_a_config() -> None:
    arguments = megatron_arguments(CONFIG)
    expected = {
        "num_layers": 3,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 151,
        "rotary_base": 1000000,
        "layernorm_epsilon": 1e-6,
        "normalization": "RMSNorm",
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    }
    assert {name: arguments[name] for name in expected} == expected


def test_both_spellings_of_a_config_say_the_same() -> None:
    newer = {name: value for name, value in CONFIG.items() if name not in ("rope_theta", "torch_dtype")}
    newer |= {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    newer["layer_types"] = ["full_attention"] * 3
    assert megatron_arguments(newer) == megatron_arguments(CONFIG)


def test_head_dim_and_missing_key_value_heads() -> None:
    """As in files of the first Llama; where transformers has a number of its own for a missing one, it is asked for."""
    config = {**CONFIGS["llama"], "head_dim": 16}
    del config["num_key_value_heads"]
    arguments = megatron_arguments(config)
    assert (arguments["kv_channels"], arguments["num_query_groups"]) == (16, 8)
    assert parameter("linear_qkv.weight", config).shape == (3 * 8 * 16, 64)
    assert parameter("linear_proj.weight", config).shape == (64, 8 * 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures GPT2LMHeadModel"),
        ({"architectures": []}, "architectures is missing"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' contradicts architectures Qwen2ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling of type 'linear'"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not an object"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters of type 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1000000.0, but rope_parameters.rope_theta is 1000"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, r"rope_scaling\.factor '8' is not a finite number above 0"),
        ({"rope_scaling": {**LLAMA3, "factor": INF}}, r"rope_scaling\.factor inf is not a finite number above 0"),
        ({"rope_scaling": {**LLAMA3, "factor": HUGE}}, r"rope_scaling\.factor 10+ is not a finite number above 0"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": NAN}}, r"rope_scaling\.low_freq_factor nan is not"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": NAN}}, r"rope_scaling\.high_freq_factor nan is not"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": HUGE}}, r"rope_scaling\.high_freq_factor 10+ is not"),
        ({"rope_scaling": {**LLAMA3, "rope_type": ["llama3"]}}, r"rope_scaling of type \['llama3'\]"),
        ({"rope_parameters": {"rope_type": {}, "rope_theta": 1e6}}, r"rope_parameters of type \{\}"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor must be below high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 2.0}}, "rope_scaling has attention_factor"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 2.0}}, "contradicts rope_parameters"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_theta": 1000.5}, "rope_theta 1000.5"),
        ({"max_position_embeddings": HUGE}, "max_position_embeddings 10+ is not a positive whole number below 2"),
        ({"rope_theta": [1]}, r"rope_theta \[1\] is not a positive whole number"),
        ({"rope_theta": {}}, r"rope_theta \{\} is not a positive whole number"),
        ({"rope_theta": True}, "rope_theta True is not a positive whole number"),
        ({"rope_theta": NAN}, "rope_theta nan is not a positive whole number"),
        ({"rope_theta": 10**30}, "rope_theta 10+ is not a positive whole number"),
        ({"rope_theta": HUGE}, "rope_theta 10+ is not a positive whole number"),
        ({"rope_parameters": {"rope_theta": [1]}}, r"rope_parameters\.rope_theta \[1\] is not a positive whole"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"use_sliding_window": "no"}, "use_sliding_window 'no' is neither true nor false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"layer_types": [1]}, r"layer_types \[1\] is no list of names"),
        ({"layer_types": [["full_attention"]]}, r"layer_types \[\['full_attention'\]\] is no list of names"),
        ({"layer_types": 5}, "layer_types 5 is no list of names"),
        ({"layer_types": True}, "layer_types True is no list of names"),
        ({"layer_types": 1.5}, "layer_types 1.5 is no list of names"),
        ({"layer_types": "full_attention"}, "layer_types 'full_attention' is no list of names"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 6}, "hidden_size 64 is not a multiple of num_attention_heads 6"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0 is not a finite number above 0"),
        ({"rms_norm_eps": NAN}, "rms_norm_eps nan is not a finite number above 0"),
        ({"rms_norm_eps": INF}, "rms_norm_eps inf is not a finite number above 0"),
        ({"rms_norm_eps": HUGE}, "rms_norm_eps 10+ is not a finite number above 0"),
        ({"initializer_range": HUGE}, "initializer_range 10+ is not a finite number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1 is neither true nor false"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 8}},
            "dual_chunk_attention_config .*remove it from config.json",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map"),
        ({"logit_scale": 0.5}, "logit_scale 0.5: not understood"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        megatron_arguments({**CONFIG, **change})


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias True: only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias True: only False"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp 2: only 1"),
        ("llama", {"sliding_window": 64}, "sliding_window 64: not understood"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window with max_window_layers 2 of 3"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": "3"}, "max_window_layers '3' is not a positive"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window 'wide' is not a positive whole number"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types .*not understood"),
    ],
)
def test_what_one_family_refuses(family: str, change: dict[str, Any], message: str) -> None:
    assert megatron_arguments(CONFIGS[family])
    with pytest.raises(CheckpointError, match=message):
        megatron_arguments({**CONFIGS[family], **change})


@pytest.mark.parametrize(
    ("family", "field"),
    [("qwen2", "num_key_value_heads"), ("qwen3", "head_dim"), ("mistral", "sliding_window")],
)
def test_a_field_whose_default_is_a_number_of_transformers_own_is_asked_for(family: str, field: str) -> None:
    config = dict(CONFIGS[family])
    del config[field]
    with pytest.raises(CheckpointError, match=f"{field} is missing"):
        megatron_arguments(config)


def test_bookkeeping_and_unset_fields_are_accepted() -> None:
    said = {"_name_or_path": "x", "bos_token_id": 1, "temperature": 0.7, "id2label": {"0": "a"}, "return_dict": True}
    unset = {"use_mrope": False, "pruned_heads": {}, "auto_map": None, "new_switch": False}
    assert megatron_arguments({**CONFIG, **said, **unset}) == megatron_arguments(CONFIG)


def test_a_window_that_no_layer_uses_is_accepted() -> None:
    assert megatron_arguments({**CONFIG, "use_sliding_window": True, "max_window_layers": 3})
    assert megatron_arguments({**CONFIG, "use_sliding_window": True, "sliding_window": None})


def test_norms_of_queries_and_keys() -> None:
    """One scale for each of a head's 16 channels, in every layer; not of the hidden size."""
    for letter in "qk":
        norm = parameter(f"self_attention.{letter}_layernorm.weight", CONFIGS["qwen3"])
        assert norm.stored_shape == (3, 16)
        assert norm.hf_names(1) == (f"model.layers.1.self_attn.{letter}_norm.weight",)
    assert megatron_arguments(CONFIGS["qwen3"])["qk_layernorm"] is True
    assert megatron_arguments(CONFIGS["llama"])["qk_layernorm"] is False


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling(spelling: str) -> None:
    config = {**CONFIGS["llama"], spelling: {**LLAMA3, "original_max_position_embeddings": 40}}
    assert rope_scaling(config) == Llama3Scaling(8.0, 1.0, 4.0, 40)
    assert rope_scaling(CONFIGS["llama"]) is None
    arguments = megatron_arguments(config)
    assert (arguments["use_rope_scaling"], arguments["rope_scaling_factor"]) == (True, 8.0)


def test_a_window_limits_the_length() -> None:
    config = CONFIGS["mistral"]
    assert (longest_sequence(config).tokens, longest_sequence(config).field) == (32, "sliding_window")
    assert str(longest_sequence(config)).endswith(
        "sliding_window in config.json: only within it, full attention is exact)"
    )
    assert megatron_arguments(config)["max_position_embeddings"] == 32
    for window in (None, 4096):
        limit = longest_sequence({**config, "sliding_window": window})
        assert (limit.tokens, limit.field) == (128, "max_position_embeddings")


def test_frequencies_in_old_files_are_ignored_and_nothing_else() -> None:
    buffer = "model.layers.31.self_attn.rotary_emb.inv_freq"
    assert "rotary frequencies" in str(ignored_tensor(CONFIGS["llama"], buffer))
    assert ignored_tensor(CONFIGS["qwen3"], buffer) is None
    assert ignored_tensor(CONFIGS["llama"], f"{buffer}.weight") is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_names_shapes_and_order_are_those_of_transformers(family: str, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**CONFIGS[family], "tie_word_embeddings": tied}
    fields = {name: value for name, value in config.items() if name not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert type(model).__name__ == config["architectures"][0]
    assert list(hf_shapes(parameter_table(config)).items()) == list(expected.items())
    assert bool(tied_copies(config)) == tied


@pytest.mark.parametrize("name", MODELS)
def test_published_models(name: str, tmp_path: Path) -> None:
    """Read as expected in the published spelling, and the same in the one in which transformers saves it today."""
    from transformers import AutoConfig

    published = MODELS[name]
    arguments = megatron_arguments(published.config)
    assert arguments["num_layers"] == published.config["num_hidden_layers"]
    assert (arguments["kv_channels"], arguments["rotary_base"]) == (published.head, published.rotary_base)
    assert sum(math.prod(p.stored_shape) for p in parameter_table(published.config)) == published.parameters
    factor = (published.config.get("rope_scaling") or {}).get("factor")
    assert rope_scaling(published.config) == (factor and Llama3Scaling(factor, 1.0, 4.0, 8192))
    assert longest_sequence(published.config).tokens == (
        published.config.get("sliding_window") or published.config["max_position_embeddings"]
    )

    AutoConfig.for_model(**published.config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert megatron_arguments(saved) == arguments
    assert rope_scaling(saved) == rope_scaling(published.config)


@pytest.mark.skipif(not REAL_CONFIGS.is_dir(), reason="the Qwen2.5 configs are not here")
@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("0.5B", 494032768),
        ("1.5B", 1543714304),
        ("3B", 3085938688),
        ("7B", 7615616512),
        ("14B", 14770033664),
        ("32B", 32763876352),
        ("72B", 72706203648),
    ],
)
def test_real_configs_give_the_published_number_of_parameters(size: str, parameters: int) -> None:
    config = json.loads((REAL_CONFIGS / f"Qwen2.5-{size}-Instruct" / "config.json").read_text())
    assert sum(math.prod(p.stored_shape) for p in parameter_table(config)) == parameters
