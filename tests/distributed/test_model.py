"""Packed, prefix-shared Megatron log-probabilities against transformers' Qwen2 on separate sequences, in float32."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_amopo.certification.tiny import VOCAB_SIZE, random_groups
from megatron_amopo.data.groups import SHARINGS
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


@pytest.fixture(scope="module")
def questions():
    """Micro-batches whose records' prompts begin with a question, as question-first prompts do."""
    return [
        random_groups(count, dimensions=d, seed=count, shared_question=True) for d, count in ((2, 3), (4, 2), (6, 1))
    ]


@pytest.mark.parametrize("sharing", SHARINGS)
def test_shared_questions_equal_transformers(ranks, workplace, questions, sharing):
    assert all(group.shared for groups in questions for group in groups)
    model = AutoModelForCausalLM.from_pretrained(workplace.hf).float().eval()
    actual = ranks.run(packed_logps, 2, workplace.mcore, questions, tp=2, sequence_parallel=True, sharing=sharing)[0]
    for logps, groups in zip(actual, questions, strict=True):
        torch.testing.assert_close(logps, separate_logps(model, groups), rtol=0, atol=TOLERANCE)


def response_lengths(groups):
    return [len(r) for g in groups for pair in zip(g.chosen, g.rejected, strict=True) for r in pair]


def test_neither_response_sees_the_other(ranks, workplace):
    """Other tokens in the chosen response change its own log-probabilities and nothing else, bit by bit."""
    groups = random_groups(3, dimensions=2, seed=4)
    changed = [replace(g, chosen=tuple((tokens + 1) % VOCAB_SIZE for tokens in g.chosen)) for g in groups]
    before, after = ranks.run(packed_logps, 1, workplace.mcore, [groups, changed])[0]
    lengths = response_lengths(groups)
    for number, (left, right) in enumerate(zip(before.split(lengths), after.split(lengths), strict=True)):
        assert torch.equal(left, right) == bool(number % 2)


@pytest.mark.parametrize("dimension", range(3))
def test_a_dimension_sees_no_other_dimensions_prompt(ranks, workplace, dimension):
    """Below a shared question, other tokens in one dimension's part of the prompt change that dimension's
    log-probabilities and no other's, bit by bit.
    """
    groups = random_groups(3, dimensions=3, seed=5, shared_question=True)

    def change(group):
        prompts = list(group.prompts)
        prompts[dimension] = prompts[dimension].copy()
        prompts[dimension][group.shared :] = (prompts[dimension][group.shared :] + 60) % VOCAB_SIZE
        return replace(group, prompts=tuple(prompts))

    changed = [change(group) for group in groups]
    assert [group.shared for group in changed] == [group.shared for group in groups]
    before, after = ranks.run(packed_logps, 1, workplace.mcore, [groups, changed])[0]
    lengths = response_lengths(groups)
    for number, (left, right) in enumerate(zip(before.split(lengths), after.split(lengths), strict=True)):
        assert torch.equal(left, right) == (number // 2 % 3 != dimension)


def test_packed_tail_padding_changes_nothing(ranks, workplace, batches, expected):
    """Whatever stands in the padding, not a bit; however long it is, nothing beyond rounding."""
    padded = {"pad_to_multiple_of": 256}
    zeros = ranks.run(packed_logps, 1, workplace.mcore, batches[:4], **padded)[0]
    others = ranks.run(packed_logps, 1, workplace.mcore, batches[:4], **padded, padding_id=77)[0]
    for left, right, reference in zip(zeros, others, expected[True], strict=False):
        assert torch.equal(left, right)
        torch.testing.assert_close(left, reference, rtol=0, atol=TOLERANCE)
