"""The flags of the launch scripts, read by Megatron's parser and its checks and ours at the scripts' real world sizes.

A flag that Megatron renames, or a combination that it comes to refuse, shows here; nothing is started.
"""

import pytest

from megatron_amopo.certification.tiny import make_data
from tests.support.jobs_launch import launch_refusal
from tests.support.launch_scripts import SHAPES, dry_run, write_config

#: Variables of a script → the world size that follows.
RUNS = {
    "7b": ("qwen2.5_7b", {}, 8),
    "7b, one rank per model": ("qwen2.5_7b", {"TP": "1", "RECOMPUTE": "full"}, 8),
    "7b, context parallel": ("qwen2.5_7b", {"CP": "2", "CUTOFF": "4096"}, 8),
    "14b": ("qwen2.5_14b", {}, 8),
    "14b, TP 2": ("qwen2.5_14b", {"TP": "2", "RECOMPUTE": "full"}, 8),
    "14b, pipeline": ("qwen2.5_14b", {"TP": "2", "PP": "2", "RECOMPUTE": "selective"}, 8),
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
def test_nothing_is_refused_in_fp8(name, recipe, ranks, places, tmp_path):
    flags, world_size = flags_of(name, places, tmp_path, {"PRECISION": "fp8", **FP8[recipe]})
    assert f"--fp8-recipe {recipe}" in " ".join(flags)
    assert ranks.run(launch_refusal, 1, flags, world_size)[0] == ""


def test_what_is_refused(ranks, places, tmp_path):
    """The tests above can fail: an unknown flag, a layout that doesn't divide, sizes that a recipe doesn't take."""

    def refusal(name, variables, *more):
        flags, world_size = flags_of(name, places, tmp_path, variables)
        return ranks.run(launch_refusal, 1, [*flags, *more], world_size)[0]

    assert "parser doesn't know" in refusal("qwen2.5_7b", {}, "--renamed-upstream")
    assert "8 doesn't divide the model's 28 attention heads" in refusal("qwen2.5_7b", {"TP": "8"})
    blockwise = {"PRECISION": "fp8", "FP8_RECIPE": "blockwise", "TP": "8"}
    assert "feed-forward size is 13824 / --tensor-model-parallel-size 8" in refusal("qwen2.5_14b", blockwise)
