"""Packed, prefix-shared Megatron log-probabilities against transformers' Qwen2 on separate sequences, in float32."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_amopo.certification.tiny import VOCAB_SIZE, random_groups
from tests.support.jobs_model import packed_logps

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


def test_neither_response_sees_the_other(ranks, workplace):
    """Other tokens in the chosen response change its own log-probabilities and nothing else, bit by bit."""
    groups = random_groups(3, dimensions=2, seed=4)
    changed = [replace(g, chosen=tuple((tokens + 1) % VOCAB_SIZE for tokens in g.chosen)) for g in groups]
    before, after = ranks.run(packed_logps, 1, workplace.mcore, [groups, changed])[0]
    lengths = [len(r) for g in groups for d in range(2) for r in (g.chosen[d], g.rejected[d])]
    for number, (left, right) in enumerate(zip(before.split(lengths), after.split(lengths), strict=True)):
        assert torch.equal(left, right) == bool(number % 2)
