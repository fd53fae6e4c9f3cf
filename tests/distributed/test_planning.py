"""The planner against Megatron: its launch commands in Megatron's parser and this project's checks, its refusals
against Megatron's, and what it says a layer keeps against what autograd keeps.
"""

import json

import numpy as np
import pytest

from megatron_amopo.certification.tiny import random_groups
from megatron_amopo.checkpoint.families import megatron_arguments
from megatron_amopo.planning.command import Places, training_flags
from megatron_amopo.planning.hardware import gpu
from megatron_amopo.planning.layout import PRECISIONS, Layout, Options
from megatron_amopo.planning.memory import kept_by_layer
from megatron_amopo.planning.refusals import refusals
from megatron_amopo.planning.sizes import ModelSizes
from megatron_amopo.planning.work import MicroBatch, Records
from tests.support.jobs import parser_flags
from tests.support.jobs_launch import launch_refusal
from tests.support.jobs_planning import saved_bytes_per_layer

FOUR_LAYERS = ModelSizes(4, 64, 96, 4, 2, 16, 151, tied=True)  # of megatron_amopo/certification/tiny.py

ACCEPTED = {
    "one rank": (Layout(), {}),
    "TP": (Layout(tp=2, dp=4), {"bf16_gradients": True}),
    "TP without SP": (Layout(tp=2, sequence_parallel=False), {}),
    "interleaved": (Layout(tp=2, pp=2, chunks=2, dp=2), {"precision_aware_optimizer": True}),
    "ends as layers": (Layout(pp=3, dp=2, count_ends=True), {"global_batch": 12}),
    "interleaved, ends as layers": (Layout(pp=2, chunks=3, count_ends=True), {}),
    "CP": (Layout(cp=2, dp=4, recompute="full"), {}),
    "recomputed MLP": (Layout(dp=8, recompute="mlp"), {}),
    "all": (Layout(tp=2, cp=2, pp=2, dp=8, chunks=2, recompute="full"), {"micro_batch": 2, "global_batch": 32}),
    "plain optimizer": (Layout(dp=2), {"distributed_optimizer": False, "sharing": "responses"}),
    "offload": (Layout(dp=2), {"precision_aware_optimizer": True, "optimizer_cpu_offload": True}),
}
REFUSED = {
    "heads": (Layout(tp=4), {}),
    "layers": (Layout(pp=3), {}),
    "ends": (Layout(pp=4, count_ends=True), {}),
    "more stages than layers": (Layout(pp=8), {}),
    "heads over context": (Layout(tp=2, cp=4), {}),
    "batch": (Layout(dp=3), {}),
    "chunks of one stage": (Layout(chunks=2), {}),
    "offload": (Layout(), {"optimizer_cpu_offload": True}),
}


def options_of(changes: dict) -> Options:
    return Options(**{"global_batch": 16, **changes})


def flags_of(layout: Layout, options: Options, workplace, tmp_path) -> list[str]:
    places = Places(model=str(workplace.hf), data=str(workplace.data), save=str(tmp_path / "run"))
    return [*training_flags(FOUR_LAYERS, layout, options, places), "--amopo-hf-cache", str(tmp_path / "cache")]


@pytest.mark.parametrize("name", ACCEPTED)
def test_commands_are_accepted(name, ranks, workplace, tmp_path):
    layout, changes = ACCEPTED[name]
    options = options_of(changes)
    assert refusals(FOUR_LAYERS, gpu("h100"), layout, options, layout.gpus) == ()
    assert ranks.run(launch_refusal, 1, flags_of(layout, options, workplace, tmp_path), layout.gpus)[0] == ""


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_planner_refuses_is_refused(name, ranks, workplace, tmp_path):
    layout, changes = REFUSED[name]
    options = options_of(changes)
    assert refusals(FOUR_LAYERS, gpu("h100"), layout, options, layout.gpus)
    assert ranks.run(launch_refusal, 1, flags_of(layout, options, workplace, tmp_path), layout.gpus)[0] != ""


@pytest.mark.parametrize("precision", [precision for precision in PRECISIONS if precision != "bf16"])
def test_flags_of_fp8_exist(precision, ranks, workplace, tmp_path):
    known = {flag for flag, _ in ranks.run(parser_flags, 1)[0].values()}
    flags = flags_of(Layout(), options_of({"precision": precision}), workplace, tmp_path)
    assert {"--fp8-format", "--fp8-recipe"} <= set(flags)
    assert {word for word in flags if word.startswith("--")} <= known


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_layers_keep_what_the_planner_says(recompute, family, tp, ranks):
    """To the last byte, with what Megatron's own layers keep on a CPU and fused ones don't added."""
    config = {
        "architectures": [family], "model_type": family[:5].lower(), "vocab_size": 151, "hidden_size": 128,
        "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "max_position_embeddings": 512, "rope_theta": 10000, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }  # fmt: skip
    groups = random_groups(2, dimensions=3, seed=3, longest=40, shortest=20, shared_question=True)
    records = Records.of(
        np.stack([group.lengths() for group in groups]), np.array([group.shared for group in groups]), "tree", ""
    )
    options = {
        "none": {},
        "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[recompute]
    arguments = megatron_arguments(json.loads(json.dumps(config)))
    kept, tokens = ranks.run(saved_bytes_per_layer, tp, arguments, groups, tp, options)[0]

    sizes, layout = ModelSizes.of(arguments), Layout(tp=tp, recompute=recompute)
    batch = MicroBatch(tokens, float(records.pairs.sum()), float(records.keys.sum()), float(records.rows.sum()))
    said = kept_by_layer(sizes, layout, batch, element=4)
    if recompute != "full":
        said += 4 * tokens * 4 * sizes.head_size  # unfused rotation keeps cosine and sine
    assert kept == said
