"""Packed, prefix-shared Megatron log-probabilities against transformers' Qwen2 on separate sequences, in float32."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.jobs_model import packed_logps
from tests.support.tiny import random_groups

DIMENSIONS = [1, 2, 4, 6]
GROUPS = [1, 2, 3, 4, 5]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def batches():
    """One micro-batch for each D and number of groups."""
    return [random_groups(count, dimensions=d, seed=10 * d + count) for d in DIMENSIONS for count in GROUPS]


def separate_logps(model, groups):
    """The plainest reference: each prompt + response alone through transformers, log-softmax, gather."""
    result = []
    for group in groups:
        for prompt, *responses in zip(group.prompts, group.chosen, group.rejected, strict=True):
            for response in responses:
                ids = torch.tensor([*prompt.tolist(), *response.tolist()])[None]
                with torch.no_grad():
                    logps = model(ids).logits[0].log_softmax(-1)
                predicted = logps[len(prompt) - 1 : -1]
                result.append(predicted.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(result)


@pytest.fixture(scope="module")
def expected(workplace, batches):
    models = {
        tied: AutoModelForCausalLM.from_pretrained(workplace.hf if tied else workplace.hf_untied)
        for tied in (True, False)
    }
    return {
        tied: [separate_logps(model.float().eval(), groups) for groups in batches] for tied, model in models.items()
    }


@pytest.mark.parametrize(
    ("tied", "tp", "sequence_parallel"),
    [(True, 1, False), (False, 1, False), (True, 2, False), (False, 2, True)],
    ids=["tied", "untied", "tied-tp2", "untied-tp2-sp"],
)
def test_equals_transformers(ranks, workplace, batches, expected, tied, tp, sequence_parallel):
    mcore = workplace.mcore if tied else workplace.mcore_untied
    actual = ranks.run(packed_logps, tp, mcore, batches, tp=tp, sequence_parallel=sequence_parallel)[0]
    worst = max((a - e).abs().max().item() for a, e in zip(actual, expected[tied], strict=True))
    print(f"largest difference of log-probabilities: {worst:.1e} nats")
    assert worst <= TOLERANCE


def test_positions_and_prefixes_matter(ranks, workplace, batches, expected):
    """The comparison above would notice if the rejected response saw the chosen one."""
    swapped = [[type(g)(g.record_id, g.prompts, g.rejected, g.chosen) for g in groups] for groups in batches[:3]]
    actual = ranks.run(packed_logps, 1, workplace.mcore, swapped)[0]
    assert all(
        (a - e).abs().max() > 1e-3 for a, e in zip(actual, expected[True][:3], strict=True) if a.shape == e.shape
    )
