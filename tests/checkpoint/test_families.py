"""The table of parameters and the Megatron arguments, against plain references and transformers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from megatron_amopo.checkpoint.families import megatron_arguments, parameter_table
from megatron_amopo.checkpoint.parameters import Parameter, hf_shapes
from megatron_amopo.errors import CheckpointError
from tests.support.shared import SHARED_DATA

REAL_CONFIGS = SHARED_DATA / "qwen2.5-configs"

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
    config = {**CONFIG, "head_dim": 16}
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
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters of type 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1000000.0, but"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_theta": 1000.5}, "rope_theta 1000.5"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 6}, "hidden_size 64 is not a multiple of num_attention_heads 6"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        megatron_arguments({**CONFIG, **change})


def test_a_window_that_no_layer_uses_is_accepted() -> None:
    assert megatron_arguments({**CONFIG, "use_sliding_window": True, "max_window_layers": 3})
    assert megatron_arguments({**CONFIG, "use_sliding_window": True, "sliding_window": None})


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_qkv_rows_against_a_plain_reference(what: str) -> None:
    """For each group: its four query heads, its key head, its value head, eight rows each."""
    columns = (64,) if what == "weight" else ()
    q, k, v = torch.randn(64, *columns), torch.randn(16, *columns), torch.randn(16, *columns)
    rows = []
    for group in range(2):
        for head in range(4):
            for row in range(8):
                rows.append(q[(group * 4 + head) * 8 + row])
        rows += [k[group * 8 + row] for row in range(8)]
        rows += [v[group * 8 + row] for row in range(8)]
    qkv = parameter(f"linear_qkv.{what}")
    assert torch.equal(qkv.join([q, k, v]), torch.stack(rows))
    assert all(torch.equal(back, piece) for back, piece in zip(qkv.split(torch.stack(rows)), (q, k, v), strict=True))


def test_gate_stands_before_up() -> None:
    gate, up = torch.randn(96, 64), torch.randn(96, 64)
    fc1 = parameter("linear_fc1.weight")
    assert fc1.hf_names(2) == ("model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight")
    assert torch.equal(fc1.join([gate, up]), torch.cat([gate, up]))


@pytest.mark.parametrize("tied", [True, False])
def test_names_shapes_and_order_are_those_of_transformers(tied: bool) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    fields = {name: value for name, value in CONFIG.items() if name not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**{**fields, "tie_word_embeddings": tied}))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    table = parameter_table({**CONFIG, "tie_word_embeddings": tied})
    assert list(hf_shapes(table).items()) == list(expected.items())


@pytest.mark.skipif(not REAL_CONFIGS.is_dir(), reason="the Qwen2.5 configs are not here")
@pytest.mark.parametrize(
    ("size", "parameters"),
    [("0.5B", 494032768), ("3B", 3085938688), ("7B", 7615616512), ("32B", 32763876352), ("72B", 72706203648)],
)
def test_real_configs_give_the_published_number_of_parameters(size: str, parameters: int) -> None:
    config = json.loads((REAL_CONFIGS / f"Qwen2.5-{size}-Instruct" / "config.json").read_text())
    assert sum(math.prod(p.stored_shape) for p in parameter_table(config)) == parameters
