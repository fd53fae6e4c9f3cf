"""Parameters of ranks against figures worked out by hand, and of whole models against their published numbers."""

from __future__ import annotations

import pytest

from megatron_amopo.checkpoint.families import megatron_arguments, parameter_table
from megatron_amopo.planning.layout import Layout
from megatron_amopo.planning.sizes import ModelSizes
from tests.planning.models import QWEN_32B
from tests.support.published_configs import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_models_have_as_many_parameters_as_published(name):
    sizes = ModelSizes.of(megatron_arguments(PUBLISHED[name].config))
    assert sizes.parameters == PUBLISHED[name].parameters


def test_a_rank_of_qwen_32b_under_tp8_pp2():
    # A layer: (5,120 + 2·1,024)·5,120 + 5,120² + 3·27,648·5,120 = 487,587,840 weights, an eighth of which is
    # 60,948,480; 7,168 / 8 biases and two norms on top. 152,064 rows are padded to 149·1,024, 19,072 for each rank.
    assert QWEN_32B.layer_parameters(tp=8) == 60_948_480 + 896 + 10_240
    assert QWEN_32B.padded_vocabulary(8) == 152_576
    layout = Layout(tp=8, pp=2)
    first = 32 * 60_959_616 + 19_072 * 5_120
    assert [QWEN_32B.stage_parameters(stage, layout) for stage in (0, 1)] == [first, first + 5_120]
    assert first == 2_048_356_352


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-8B"])
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(pp=4), Layout(pp=2, count_ends=True)])
def test_stages_hold_the_model(name, layout):
    """All of it, once; a tied embedding stands on the first and the last stage of several."""
    config = PUBLISHED[name].config
    sizes = ModelSizes.of(megatron_arguments(config))
    held = sum(sizes.stage_parameters(stage, layout) for stage in layout.stages)
    padding = sizes.padded_vocabulary(1) - sizes.vocabulary
    copies = 1 if sizes.tied and layout.pp == 1 else 2
    table = sum(sum_of(parameter.shape) * (parameter.layers or 1) for parameter in parameter_table(config))
    extra = sizes.vocabulary * sizes.hidden if sizes.tied and layout.pp > 1 else 0
    assert held == table + extra + copies * padding * sizes.hidden
    assert sum(sizes.stage_layers(stage, layout) for stage in layout.stages) == sizes.layers


def sum_of(shape: tuple[int, ...]) -> int:
    numbers = 1
    for size in shape:
        numbers *= size
    return numbers
