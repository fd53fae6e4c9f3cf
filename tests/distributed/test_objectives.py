"""The objective's flags reach the step: what a run logs of its first step follows from the flags and the data."""

import math
from dataclasses import replace

import pytest

from megatron_amopo.certification.observed_run import metrics, train
from megatron_amopo.certification.tiny import make_data
from megatron_amopo.data.batching import SampleOrder
from megatron_amopo.data.dataset import PreparedGroups

NAMES = ("general", "quality_1", "quality_2")
SEED = 7


@pytest.fixture(scope="module")
def scored(workplace, tmp_path_factory):
    place = replace(workplace, data=tmp_path_factory.mktemp("scored") / "data")
    make_data(place.data, validation=0, random_scores=True, rewards=("tone", "quality_1"))
    return place


@pytest.fixture(scope="module")
def first_step(ranks, scored, tmp_path_factory):
    def run(*extra: str) -> dict[str, float]:
        save = tmp_path_factory.mktemp("run")
        flags = [
            "--amopo-data", str(scored.data), "--pretrained-checkpoint", str(scored.mcore),
            "--tensorboard-dir", str(save), "--micro-batch-size", "2", "--global-batch-size", "8",
            "--train-iters", "1", "--log-interval", "1", "--lr", "1e-3", "--amopo-seed", str(SEED), *extra,
        ]  # fmt: skip
        ranks.run(train, 1, flags, want_tensors=False)
        return metrics(save)[0]

    return run


def weights(step):
    return [step[f"weight/{name}"] for name in NAMES]


def test_sft_under_fixed_weights(first_step):
    vector = "quality_2=5,general=1,quality_1=2"
    step = first_step("--amopo-pairwise", "sft", "--amopo-weighting", "fixed", "--amopo-weights", vector)
    assert weights(step) == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-6)
    losses = [step[f"loss/{name}"] for name in NAMES]
    assert losses == pytest.approx([-step[f"logps_chosen/{name}"] for name in NAMES], rel=1e-6)
    assert step["loss"] == pytest.approx(losses[0] / 8 + losses[1] / 4 + losses[2] * 5 / 8, rel=1e-6)


def test_weights_from_scores_with_temperature_and_floor(first_step, scored):
    step = first_step(
        *("--amopo-weighting", "from-scores", "--amopo-weight-temperature", "2"),
        *("--amopo-weight-floor", "quality_1=0.3"),
    )
    groups = PreparedGroups.open(scored.data)
    indices, _ = SampleOrder(len(groups), SEED)(range(8))
    expected = [0.0, 0.0, 0.0]
    for index in indices:
        first, second = groups.scores(int(index))[0].tolist()
        powers = [math.exp(score / 2) for score in ((first + second) / 2, first, second)]
        for d in range(3):
            expected[d] += (0.3 * (d == 1) + 0.7 * powers[d] / sum(powers)) / 8
    assert weights(step) == pytest.approx(expected, rel=1e-5)


def test_mean_weights_are_those_of_no_noise(first_step):
    gaussian, mean = first_step(), first_step("--amopo-weighting", "mean")
    assert weights(gaussian) != pytest.approx(weights(mean), rel=1e-4)
    assert [mean[f"loss/{name}"] for name in NAMES] == [gaussian[f"loss/{name}"] for name in NAMES]


def test_another_seed_is_another_step(first_step):
    """Other records, other noise."""
    step, other = first_step(), first_step("--amopo-seed", str(SEED + 1))
    assert other["loss"] != pytest.approx(step["loss"], rel=1e-6)
    assert weights(other) != pytest.approx(weights(step), rel=1e-4)


def test_one_dimension_is_the_single_objective_method(first_step):
    step = first_step("--amopo-dimensions", "general", "--amopo-pairwise", "simpo")
    assert step["weight/general"] == 1
    assert step["loss"] == step["loss/general"]


@pytest.mark.parametrize("margins", ["scores", "rewards"])
def test_modpo_margins_are_the_datas(first_step, scored, margins):
    """Before the first step policy and reference agree, so that the loss is −log σ(−w₋ₖᵀ·Δr₋ₖ / w_k)."""
    weights = {"scores": "quality_2=0.25,quality_1=0.75", "rewards": "quality_2=0.25,quality_1=0.5,tone=0.25"}[margins]
    step = first_step(
        *("--amopo-dimensions", "general", "--amopo-pairwise", "modpo", "--amopo-modpo-margins", margins),
        *("--amopo-modpo-weights", weights, "--amopo-modpo-objective", "quality_2"),
    )
    groups = PreparedGroups.open(scored.data)
    indices, _ = SampleOrder(len(groups), SEED)(range(8))
    expected = 0.0
    for index in indices:
        if margins == "scores":
            (chosen, _), (rejected, _) = groups.scores(int(index))
            others = 0.75 * float(chosen - rejected)
        else:
            (tone, quality_1), (rejected_tone, rejected_quality_1) = groups.rewards(int(index))
            others = 0.25 * float(tone - rejected_tone) + 0.5 * float(quality_1 - rejected_quality_1)
        expected += math.log1p(math.exp(others / 0.25)) / len(indices)
    assert step["loss"] == pytest.approx(expected, rel=1e-5)
