"""The plain reference itself: against the released code's figures, and against sequences that stand alone."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_amopo.certification import reference
from megatron_amopo.certification.layouts import Problem
from megatron_amopo.certification.reference import StepData, padded_rows, plain_loss
from megatron_amopo.certification.tiny import make_hf_model, random_groups
from megatron_amopo.data.groups import TokenizedGroup
from tests.support.shared import GOLDEN

CASES = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []


def group_of(case):
    """A golden record: rows of labels, in which −100 stands before and behind the response."""
    rows = []
    for ids, labels in zip(case["input_ids"], case["labels"], strict=True):
        ids, labels = np.array(ids, dtype=np.int32), np.array(labels)
        (places,) = np.nonzero(labels != -100)
        rows.append((ids[: places[0]], labels[places].astype(np.int32)))
    return TokenizedGroup(
        0,
        prompts=tuple(prompt for prompt, _ in rows[::2]),
        chosen=tuple(response for _, response in rows[::2]),
        rejected=tuple(response for _, response in rows[1::2]),
    )


@pytest.mark.skipif(not CASES, reason="no golden figures here")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_equals_the_released_code(number, monkeypatch):
    case = CASES[number]
    rows = len(case["labels"])
    logits = torch.tensor(case["logits"], dtype=torch.float64).view(rows, case["seq"], case["vocab"]).requires_grad_()
    noise = torch.tensor([case["noise_chosen"], case["noise_rejected"]], dtype=torch.float64).T[None]

    def model(input_ids, attention_mask):
        return SimpleNamespace(logits=logits[:, : input_ids.shape[1]])

    monkeypatch.setattr(reference, "FTX_GAMMA", case["ftx_gamma"])
    monkeypatch.setattr(reference, "SIMPO_BETA", case["beta"])
    monkeypatch.setattr(reference, "SIMPO_GAMMA", case["simpo_gamma"])
    monkeypatch.setattr(reference, "ORPO_BETA", case["beta"])
    # The released code averages over the dimensions, the paper sums.
    loss = plain_loss(model, StepData([group_of(case)], noise), Problem(pairwise=case["loss_type"]))[0] / (rows // 2)
    assert loss.item() == pytest.approx(case["loss_reference_code"], rel=1e-6)
    loss.backward()
    assert logits.grad.norm().item() == pytest.approx(case["grad_logits_norm"], rel=1e-6)


def figures_of(sum_logps):
    """Of responses of two tokens, for losses that read nothing but these."""
    sum_logps = torch.tensor(sum_logps, dtype=torch.float64)
    return reference.ResponseFigures(sum_logps, torch.full_like(sum_logps, 2), sum_logps.exp(), sum_logps.exp())


def test_modpo_by_hand():
    """One record, one prompt: log ratios 1 and −1, so β·h = 0.2; the other objective (w 0.25) prefers the chosen
    response by 3 points, the trained one (w 0.75) has no say: z = (0.2 − 0.75) / 0.75.
    """
    scores = torch.tensor([[[5, 2], [1, 4]]])
    losses = reference._pair_losses("modpo", figures_of([[[-3.0, -6.0]]]), scores, torch.tensor([[[-4.0, -5.0]]]))
    assert losses.tolist() == [[pytest.approx(math.log1p(math.exp(0.55 / 0.75)))]]


def test_weights_from_scores_by_hand():
    """Of the chosen response; the general prompt has the mean of both, 3."""
    step = StepData([], torch.zeros(1, 3, 2), torch.tensor([[[5, 1], [1, 1]]]))
    weights = reference._weights("from-scores", figures_of([[[-1.0, -1.0]] * 3]), step)
    powers = [math.exp(score) for score in (3, 5, 1)]
    assert weights.tolist() == [pytest.approx([power / sum(powers) for power in powers])]


def test_padding_changes_nothing(tmp_path):
    """Each record's loss among others, longer and shorter, is its loss alone."""
    model = make_hf_model(tmp_path / "hf").double()
    groups = random_groups(4, dimensions=2, seed=5)
    noise = torch.randn(4, 2, 2)
    together = plain_loss(model, StepData(groups, noise), Problem())
    alone = [plain_loss(model, StepData([g], noise[[i]]), Problem())[0] for i, g in enumerate(groups)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-6, atol=0)  # transformers' norms are float32


def test_rows_are_prompt_and_response():
    (group,) = random_groups(1, dimensions=2, seed=3)
    ids, labels = padded_rows([group])
    assert ids.shape[0] == labels.shape[0] == 4
    expected = [(p, r) for p, *pair in zip(group.prompts, group.chosen, group.rejected, strict=True) for r in pair]
    for row, (prompt, response) in enumerate(expected):
        end = len(prompt) + len(response)
        assert ids[row, :end].tolist() == [*prompt, *response]
        assert labels[row].tolist() == [-100] * len(prompt) + response.tolist() + [-100] * (ids.shape[1] - end)
