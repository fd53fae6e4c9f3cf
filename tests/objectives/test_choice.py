"""Choosing an objective: what is refused, by which words, and what a run remembers of its choice."""

import math
import pickle
import re

import pytest
import torch

from megatron_amopo.errors import ConfigError
from megatron_amopo.objectives import PAIRWISE_LOSSES, PUBLISHED, WEIGHTINGS, amopo_loss, choose_objective
from tests.support.random_pairs import random_pairs

DIMENSIONS, SCORED = ("general", "helpfulness", "correctness"), ("helpfulness", "correctness")
WEIGHTS = {"helpfulness": 0.25, "correctness": 0.75}
MODPO = {"modpo_weights": WEIGHTS, "modpo_objective": "correctness"}
OF_REWARDS = {"modpo_objective": "correctness", "modpo_margins": "rewards"}
OF_DREAMS = {"modpo_margins": "dreams"}


def refused(message, dimensions=DIMENSIONS, scored=SCORED, given=None, **names):
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose_objective(dimensions, scored, hyperparameters=given or {}, **names)


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        ({"pairwise": "dpo2"}, {}, "unknown pairwise loss 'dpo2'; known: simpo, orpo, dpo"),
        ({"weighting": "loud"}, {}, "unknown weighting 'loud'"),
        ({}, {"volume": 1.0}, "unknown hyperparameter 'volume'"),
        ({"pairwise": "orpo"}, {"gamma": 2.0}, "'orpo' has no gamma, which is of simpo: leave out --amopo-gamma"),
        ({"pairwise": "sft"}, {"beta": 1.0}, "'sft' has no beta, which is of simpo, orpo, dpo, ipo, modpo: leave out"),
        ({}, {"label_smoothing": 0.0}, "'simpo' has no label_smoothing, which is of dpo: leave out --amopo-label-"),
        ({"pairwise": "dpo"}, MODPO, "'dpo' has no modpo_weights, which is of modpo: leave out --amopo-modpo-weights"),
        ({}, {"weights": {"general": 1}}, "'gaussian' has no weights, which is of fixed: leave out --amopo-weights"),
        ({"weighting": "uniform"}, {"weight_temperature": 2.0}, "'uniform' has no weight_temperature"),
        ({"weighting": "uniform"}, {"weight_floor": 0.1}, "leave out --amopo-weight-floor"),
        ({"weighting": "fixed"}, {}, "--amopo-weighting fixed needs --amopo-weights"),
        ({"pairwise": "modpo"}, {}, "--amopo-pairwise modpo needs --amopo-modpo-weights"),
        ({"pairwise": "modpo"}, {"modpo_weights": WEIGHTS}, "modpo needs --amopo-modpo-objective"),
        ({}, {"beta": 0.0}, "--amopo-beta is 0.0; expected more than 0"),
        ({}, {"beta": math.inf}, "--amopo-beta is inf; expected a number"),
        ({}, {"gamma": math.nan}, "--amopo-gamma is nan; expected a number"),
        ({"pairwise": "dpo"}, {"label_smoothing": 0.5}, "--amopo-label-smoothing is 0.5; expected 0 or more and less"),
        ({"ftx_gamma": -1.0}, {}, "--amopo-ftx-gamma is -1.0; expected 0 or more"),
        ({}, {"weight_temperature": 0.0}, "--amopo-weight-temperature is 0.0; expected more than 0"),
        ({}, {"weight_floor": -0.1}, "--amopo-weight-floor is -0.1; expected 0 or more"),
        ({}, {"weight_floor": 1 / 3}, "--amopo-weight-floor sums to 1 over 3 dimensions; expected less than 1"),
        ({}, {"weight_floor": {"general": 0.6, "correctness": 0.6}}, "--amopo-weight-floor sums to 1.2"),
        ({}, {"weight_floor": {"beauty": 0.1}}, "--amopo-weight-floor names 'beauty', which is none of the trained"),
        (
            {"weighting": "fixed"},
            {"weights": {"general": 1.0, "helpfulness": 1.0}},
            "--amopo-weights says nothing of 'correctness'",
        ),
        ({"weighting": "fixed"}, {"weights": dict.fromkeys(DIMENSIONS, 0.0)}, "--amopo-weights are all 0"),
        (
            {"weighting": "fixed"},
            {"weights": {**dict.fromkeys(DIMENSIONS, 1.0), "general": -1.0}},
            "--amopo-weights general is -1.0; expected 0 or more",
        ),
        (
            {"pairwise": "modpo"},
            {"modpo_weights": {"general": 1.0}, "modpo_objective": "general"},
            "--amopo-modpo-weights names 'general', which is none of the scored dimensions: helpfulness, correctness",
        ),
        (
            {"pairwise": "modpo"},
            {"modpo_weights": {"helpfulness": 0.5, "correctness": 0.6}, "modpo_objective": "correctness"},
            "--amopo-modpo-weights sum to 1.1; expected 1",
        ),
        (
            {"pairwise": "modpo"},
            {"modpo_weights": WEIGHTS, "modpo_objective": "beauty"},
            "--amopo-modpo-objective beauty is none of the scored dimensions",
        ),
        (
            {"pairwise": "modpo"},
            {"modpo_weights": {"helpfulness": 1.0}, "modpo_objective": "correctness"},
            "--amopo-modpo-objective correctness has no weight in --amopo-modpo-weights",
        ),
    ],
)
def test_refusals(names, given, message):
    refused(message, given=given, **names)


def test_scores_that_the_data_lacks_are_refused():
    refused("--amopo-weighting from-scores needs scores", scored=(), weighting="from-scores")
    refused("--amopo-pairwise modpo needs scores", scored=(), pairwise="modpo", given=MODPO)


def test_rewards_that_the_data_lacks_are_refused():
    """The trained objective's own reward isn't read: it may be a score alone."""
    rewarded, given = ("verbosity",), {"modpo_weights": {"verbosity": 0.25, "correctness": 0.75}, **OF_REWARDS}
    choose_objective(DIMENSIONS, SCORED, rewarded, pairwise="modpo", hyperparameters=given)
    refused("the data was prepared without rewards; prepare it again with --rewards", pairwise="modpo", given=given)
    for weights, objective, message in (
        (WEIGHTS, "correctness", "--amopo-modpo-weights names 'helpfulness', which is none of the rewards of the data"),
        ({"verbosity": 1.0}, "beauty", "--amopo-modpo-objective beauty is none of the rewards of the data: verbosity"),
    ):
        given = {"modpo_margins": "rewards", "modpo_weights": weights, "modpo_objective": objective}
        with pytest.raises(ConfigError, match=re.escape(message)):
            choose_objective(DIMENSIONS, SCORED, rewarded, pairwise="modpo", hyperparameters=given)
    refused("--amopo-modpo-margins dreams: expected scores or", pairwise="modpo", given={**MODPO, **OF_DREAMS})
    refused("'dpo' has no modpo_margins, which is of modpo", pairwise="dpo", given=OF_DREAMS)


@pytest.mark.parametrize(
    ("weighting", "given"),
    [
        ("gaussian", {"weight_temperature": 2.0}),
        ("from-scores", {"weight_floor": 0.1}),
        ("fixed", {"weights": {"general": 1.0}}),
    ],
)
def test_one_dimension_has_nothing_to_weigh(weighting, given):
    """Not even a vector of one."""
    (name,) = given
    message = f"--amopo-{name.replace('_', '-')}: a single dimension has weight 1 whatever it says"
    refused(message, dimensions=["general"], weighting=weighting, given=given)


@pytest.mark.parametrize("weighting", ["mean", "uniform", "from-scores"])
def test_one_dimension_has_no_other_weighting(weighting):
    message = f"--amopo-weighting {weighting}: a single dimension has weight 1 whatever it says; leave it out"
    refused(message, dimensions=["general"], weighting=weighting)


def test_modpo_with_one_objective_has_no_margins():
    alone = {"modpo_weights": {"correctness": 1.0}, "modpo_objective": "correctness"}
    choose_objective(DIMENSIONS, SCORED, pairwise="modpo", hyperparameters=alone)
    message = "--amopo-modpo-margins scores: --amopo-modpo-weights has no objective beside correctness"
    refused(message, pairwise="modpo", given={**alone, "modpo_margins": "scores"})


@pytest.mark.parametrize("pairwise", PAIRWISE_LOSSES)
def test_one_dimension_is_the_pair_loss_by_itself(pairwise):
    pairs = random_pairs(dimensions=1)
    given = MODPO if pairwise == "modpo" else {}
    result = amopo_loss(pairs, choose_objective(["general"], SCORED, pairwise=pairwise, hyperparameters=given))
    assert torch.equal(result.loss, result.pair_losses[:, 0])


def test_what_a_run_remembers():
    """The published objective's record is that of runs from before there was a choice, so that they can go on."""
    assert PUBLISHED.flags == {
        "--amopo-pairwise": "simpo",
        "--amopo-beta": 0.8,
        "--amopo-gamma": 2.0,
        "--amopo-ftx-gamma": 0.0,
        "--amopo-weighting": "gaussian",
    }
    given = {**MODPO, "weight_floor": {"general": 0.2}, "weight_temperature": 1.0}
    assert choose_objective(DIMENSIONS, SCORED, pairwise="modpo", ftx_gamma=0.5, hyperparameters=given).flags == {
        "--amopo-pairwise": "modpo",
        "--amopo-beta": 0.1,
        "--amopo-modpo-weights": WEIGHTS,
        "--amopo-modpo-objective": "correctness",
        "--amopo-modpo-margins": "scores",
        "--amopo-ftx-gamma": 0.5,
        "--amopo-weighting": "gaussian",
        "--amopo-weight-floor": {"general": 0.2},
    }


def test_what_an_objective_needs():
    needs = {name: (m.needs_reference, m.needs_scores) for name, m in {**PAIRWISE_LOSSES, **WEIGHTINGS}.items()}
    assert [name for name, (reference, _) in needs.items() if reference] == ["dpo", "ipo", "modpo"]
    assert [name for name, (_, scores) in needs.items() if scores] == ["modpo", "from-scores"]
    assert choose_objective(DIMENSIONS, SCORED, pairwise="dpo", weighting="from-scores").needs_reference
    assert not choose_objective(DIMENSIONS, SCORED, pairwise="sft", weighting="from-scores").needs_reference


def test_an_objective_travels_to_other_processes():
    pairs = random_pairs()
    objective = choose_objective(DIMENSIONS, SCORED, pairwise="modpo", weighting="from-scores", hyperparameters=MODPO)
    sent = pickle.loads(pickle.dumps(objective))
    assert torch.equal(amopo_loss(pairs, sent).loss, amopo_loss(pairs, objective).loss)
