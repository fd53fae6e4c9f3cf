"""The flags of the launch scripts, read by Megatron's parser and its checks and ours at the scripts' real world sizes.

A flag that Megatron renames, or a combination that it comes to refuse, shows here; nothing is started.
"""

import pytest

from megatron_amopo.certification.tiny import make_data
from megatron_amopo.training.fp8 import RECIPE_FLAGS
from tests.support.jobs_launch import launch_refusal
from tests.support.launch_scripts import SHAPES, dry_run, write_config

#: Variables of a script → the world size that follows.
RUNS = {
    "7b": ("qwen2.5_7b", {}, 8),
    "7b, one rank per model": ("qwen2.5_7b", {"TP": "1", "RECOMPUTE": "full"}, 8),
    "7b, context parallel": ("qwen2.5_7b", {"CP": "2", "CUTOFF": "4096"}, 8),
    "14b": ("qwen2.5_14b", {}, 8),
    "14b, TP 2": ("qwen2.5_14b", {"TP": "2", "RECOMPUTE": "full"}, 8),
    "14b, pipeline": ("qwen2.5_14b", {"TP": "2", "PP": "2", "RECOMPUTE": "mlp"}, 8),
    "32b on two nodes": ("qwen2.5_32b", {}, 16),
    "32b on eight nodes": ("qwen2.5_32b", {"NODES": "8"}, 64),
    "32b, pipeline": ("qwen2.5_32b", {"NODES": "8", "TP": "4", "PP": "2", "GLOBAL_BATCH": "128"}, 64),
}
FP8 = {
    "tensorwise": {"FP8_RECIPE": "tensorwise"},
    "blockwise": {"FP8_RECIPE": "blockwise", "FP8_BF16_LAYERS": "2"},
    "delayed": {"FP8_RECIPE": "delayed", "FP8_BF16_LAYERS": "0"},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Prepared data of four dimensions, and a folder for each model."""
    root = tmp_path_factory.mktemp("launch")
    make_data(root / "data", train=200, dimensions=4)
    for name in SHAPES:
        write_config(root / name, name)
    return root


def flags_of(name, places, tmp_path, variables):
    shown = dry_run(f"{name}.sh", str(places / "data"), str(places / name), str(tmp_path / "out"), **variables)
    return shown.training_flags, shown.world_size


@pytest.mark.parametrize("case", RUNS)
def test_nothing_is_refused(case, ranks, places, tmp_path):
    name, variables, world_size = RUNS[case]
    flags, shown_world_size = flags_of(name, places, tmp_path, variables)
    assert shown_world_size == world_size
    assert ranks.run(launch_refusal, 1, flags, world_size)[0] == ""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recipe", FP8)
def test_fp8_is_refused_by_the_machine_alone(name, recipe, ranks, places, tmp_path):
    flags, world_size = flags_of(name, places, tmp_path, {"PRECISION": "fp8", **FP8[recipe]})
    assert " ".join(RECIPE_FLAGS[recipe]) in " ".join(flags)
    assert ranks.run(launch_refusal, 1, flags, world_size)[0] == ""
    own_words = ranks.run(launch_refusal, 1, flags, world_size, on_hopper=False)[0]
    assert "--transformer-impl transformer_engine needs Transformer Engine, which isn't installed" in own_words


def test_what_is_refused(ranks, places, tmp_path):
    """The check above can fail: a flag that is unknown, a layout that doesn't divide, a configuration."""
    name = "qwen2.5_7b"
    flags, _ = flags_of(name, places, tmp_path, {})
    assert (
        "unrecognized arguments: --renamed-upstream"
        in ranks.run(launch_refusal, 1, [*flags, "--renamed-upstream"], 8)[0]
    )
    assert (
        "--tensor-model-parallel-size 8 doesn't divide the model's 28 attention heads"
        in ranks.run(launch_refusal, 1, flags_of(name, places, tmp_path, {"TP": "8"})[0], 8)[0]
    )
    flags, _ = flags_of(name, places, tmp_path, {"PRECISION": "fp8", "FP8_RECIPE": "delayed", "FP8_BF16_LAYERS": "0"})
    assert (
        "--first-last-layers-bf16 doesn't work with --fp8-recipe delayed"
        in ranks.run(launch_refusal, 1, [*flags, "--first-last-layers-bf16"], 8)[0]
    )
    flags, _ = flags_of("qwen2.5_14b", places, tmp_path, {"PRECISION": "fp8", "FP8_RECIPE": "blockwise", "TP": "8"})
    assert "feed-forward size is 13824" in ranks.run(launch_refusal, 1, flags, 8)[0]
