"""What FP8 asks of a run: padding that gives every rank aligned parts, and refusals before a GPU minute is spent."""

from argparse import Namespace

import pytest

from megatron_amopo.errors import ConfigError
from megatron_amopo.training.fp8 import ALIGNMENT, check_fp8, precision_of, token_multiple

#: Qwen2.5-14B's sizes.
RUN = {
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "transformer_impl": "transformer_engine",
    "bf16": True,
    "first_last_layers_bf16": False,
    "amopo_fp8_check_interval": None,
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "hidden_size": 5120,
    "ffn_hidden_size": 13824,
    "num_attention_heads": 40,
    "num_query_groups": 8,
    "kv_channels": 128,
}


def run(**changes):
    return Namespace(**{**RUN, **changes})


@pytest.mark.parametrize("recipe", ALIGNMENT)
@pytest.mark.parametrize(("tp", "sp", "cp"), [(1, False, 1), (4, False, 1), (4, True, 1), (2, True, 2), (1, False, 4)])
def test_every_rank_gets_an_aligned_part(recipe, tp, sp, cp):
    args = run(fp8_recipe=recipe, tensor_model_parallel_size=tp, sequence_parallel=sp, context_parallel_size=cp)
    of_rank = token_multiple(args) / cp / (tp if sp else 1)
    assert of_rank == ALIGNMENT[recipe]


def test_without_fp8_only_the_split_counts():
    assert token_multiple(run(fp8=None)) == 1
    assert token_multiple(run(fp8=None, tensor_model_parallel_size=4, sequence_parallel=True)) == 4


def test_precisions_that_differ_have_different_names():
    """Formats differ in the backward pass alone."""
    ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}
    named = {
        "float32": {"fp8": None, "bf16": False},
        "bfloat16": {"fp8": None},
        "fp8-tensorwise": {},
        "fp8-blockwise": {"fp8_recipe": "blockwise"},
        "fp8-tensorwise-bf16-1-2": ends,
        "fp8-tensorwise-bf16-1-1": {**ends, "num_layers_at_end_in_bf16": 1},
    }
    assert [precision_of(run(**changes)) for changes in named.values()] == list(named)
    assert precision_of(run(fp8="e4m3")) == precision_of(run(fp8="hybrid"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp8_recipe": "mxfp8"}, "--fp8-recipe mxfp8 is not supported; known: delayed, tensorwise, blockwise"),
        ({"transformer_impl": "local"}, "--transformer-impl transformer_engine"),
        ({"bf16": False}, "--fp8-format needs --bf16"),
        ({"fp8_recipe": "delayed", "first_last_layers_bf16": True}, "--first-last-layers-bf16 doesn't work with"),
        (
            {"fp8_recipe": "blockwise", "tensor_model_parallel_size": 8},
            "feed-forward size is 13824 / --tensor-model-parallel-size 8 = 1728",
        ),
        ({"hidden_size": 5128}, "hidden size is 5128 = 5128"),
        ({"kv_channels": 100, "tensor_model_parallel_size": 8}, "attention heads' size is 4000 / --tensor"),
        (
            {"num_attention_heads": 48, "num_query_groups": 1, "kv_channels": 8},
            "queries', keys' and values' size is 400 ",
        ),
        ({"fp8": None, "first_last_layers_bf16": True}, "--first-last-layers-bf16 is about FP8"),
        ({"fp8": None, "amopo_fp8_check_interval": 5}, "--amopo-fp8-check-interval is about FP8"),
    ],
)
def test_refused(changes, message):
    if "queries" in message:
        changes |= {"fp8_recipe": "blockwise", "hidden_size": 384}
    with pytest.raises(ConfigError) as refused:
        check_fp8(run(**changes))
    assert message in str(refused.value)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("recipe", ALIGNMENT)
def test_layouts_that_fit(recipe, tp):
    check_fp8(run(fp8_recipe=recipe, tensor_model_parallel_size=tp))
    check_fp8(run(fp8=None, tensor_model_parallel_size=tp))
