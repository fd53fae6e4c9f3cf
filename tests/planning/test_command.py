"""The launch command as text; ``tests/distributed/test_planning.py`` gives its flags to Megatron's parser."""

from __future__ import annotations

import shlex

from megatron_amopo.planning.command import Places, launch_command, shown, training_flags
from megatron_amopo.planning.layout import Layout, Options
from tests.planning.models import QWEN_32B
from tests.support.launch_scripts import dry_run

PLACES = Places(model="Qwen 2.5", data="data", save="run")


def test_one_node_and_several():
    options = Options(global_batch=64)
    one = launch_command(QWEN_32B, Layout(tp=4), options, PLACES, gpus_per_node=8)
    assert one[:5] == ["torchrun", "--nproc-per-node", "4", "-m", "megatron_amopo.train"]
    several = launch_command(QWEN_32B, Layout(tp=8, pp=2, chunks=4), options, PLACES, gpus_per_node=8)
    assert several[:5] == ["torchrun", "--nproc-per-node", "8", "--nnodes", "2"]
    assert several[several.index("--num-layers-per-virtual-pipeline-stage") + 1] == "8"


def test_hyperparameters_are_the_launch_scripts(tmp_path):
    """Both have the published ones; Megatron's default of weight decay, for one, is another."""
    flags = training_flags(QWEN_32B, Layout(tp=8, dp=2), Options(64), PLACES)
    script = dry_run("qwen2.5_32b.sh", "data", "model", str(tmp_path)).training_flags
    for flag in ("--lr", "--lr-decay-style", "--lr-warmup-fraction", "--clip-grad", "--weight-decay", "--amopo-epochs"):
        assert flags[flags.index(flag) + 1] == script[script.index(flag) + 1], flag


def test_what_is_shown_is_what_is_run():
    words = launch_command(QWEN_32B, Layout(tp=8, pp=2, dp=4), Options(64), PLACES, gpus_per_node=8)
    text = shown(words)
    assert all(len(line) <= 120 for line in text.splitlines())
    assert shlex.split(text.replace("\\\n", "")) == words
    assert '"$MASTER_ADDR:29500"' in text  # the shell fills it in
