"""The launch command as text; ``tests/distributed/test_planning.py`` gives its flags to Megatron's parser."""

from __future__ import annotations

import shlex

from megatron_amopo.planning.command import Places, launch_command, shown
from megatron_amopo.planning.layout import Layout, Options
from tests.planning.models import QWEN_32B

PLACES = Places(model="Qwen 2.5", data="data", save="run")


def test_one_node_and_several():
    options = Options(global_batch=64)
    one = launch_command(QWEN_32B, Layout(tp=4), options, PLACES, gpus_per_node=8)
    assert one[:5] == ["torchrun", "--nproc-per-node", "4", "-m", "megatron_amopo.train"]
    several = launch_command(QWEN_32B, Layout(tp=8, pp=2, chunks=4), options, PLACES, gpus_per_node=8)
    assert several[:5] == ["torchrun", "--nproc-per-node", "8", "--nnodes", "2"]
    assert several[several.index("--num-layers-per-virtual-pipeline-stage") + 1] == "8"


def test_what_is_shown_is_what_is_run():
    words = launch_command(QWEN_32B, Layout(tp=8, pp=2, dp=4), Options(64), PLACES, gpus_per_node=8)
    text = shown(words)
    assert all(len(line) <= 120 for line in text.splitlines())
    assert shlex.split(text.replace("\\\n", "")) == words
    assert '"$MASTER_ADDR:29500"' in text  # the shell fills it in
