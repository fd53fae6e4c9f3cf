"""The length limit: the released rule, and what it must never do."""

import numpy as np
import pytest

from megatron_amopo.data.cutting import cut_lengths, cut_pairs
from megatron_amopo.data.problems import RecordProblem

HEADER = np.array([90, 91, 92], dtype=np.int32)


def released_rule(source_len, target_len, cutoff_len):
    """LLaMA-Factory's rule, written out in floating point as it is there."""
    if target_len * 2 < cutoff_len:
        max_target_len = cutoff_len
    elif source_len * 2 < cutoff_len:
        max_target_len = cutoff_len - source_len
    else:
        max_target_len = int(cutoff_len * (target_len / (source_len + target_len)))
    new_target_len = min(max_target_len, target_len)
    max_source_len = max(cutoff_len - new_target_len, 0)
    return min(max_source_len, source_len), new_target_len


def test_the_released_rule():
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        source, target = (int(n) for n in rng.integers(1, 3000, 2))
        cutoff = int(rng.choice([256, 1000, 1024, 2048]))
        expected = released_rule(source, target, cutoff)
        kept = cut_lengths(source, target, cutoff)
        # Where source + target divides, floating point may fall just below the whole number that it stands for.
        assert kept == expected or (cutoff * target % (source + target) == 0 and kept[1] == expected[1] + 1)
        assert sum(kept) <= cutoff


def ids(start, count):
    return np.arange(start, start + count, dtype=np.int32)


def prompt(count):
    return np.concatenate([ids(0, count - 3), HEADER])


def cut(prompts, chosen, rejected, cutoff, rule="proportional"):
    return cut_pairs(prompts, chosen, rejected, cutoff=cutoff, rule=rule, header=HEADER)


@pytest.mark.parametrize("cutoff", [None, 30])
def test_what_fits_is_untouched(cutoff):
    pairs = cut([prompt(10), prompt(20)], ids(100, 10), ids(200, 5), cutoff)
    assert [len(p) for p in pairs.prompts] == [10, 20]
    assert all(len(c) == 10 and len(r) == 5 for c, r in zip(pairs.chosen, pairs.rejected, strict=True))
    assert pairs.prompts_cut == pairs.responses_cut == 0


def test_each_prompt_is_cut_by_itself_and_keeps_its_header():
    pairs = cut([prompt(10), prompt(60)], ids(100, 12), ids(200, 5), 32)
    assert [len(p) for p in pairs.prompts] == [10, 20]
    np.testing.assert_array_equal(pairs.prompts[1], np.concatenate([ids(0, 17), HEADER]))
    assert pairs.prompts_cut == 1
    assert pairs.responses_cut == 0


def test_the_longer_response_sets_the_limit_for_both():
    pairs = cut([prompt(10)], ids(100, 40), ids(200, 25), 32)
    assert (len(pairs.prompts[0]), len(pairs.chosen[0]), len(pairs.rejected[0])) == (10, 22, 22)
    np.testing.assert_array_equal(pairs.chosen[0], ids(100, 22))
    assert pairs.responses_cut == 2


@pytest.mark.parametrize(
    ("prompt_tokens", "response_tokens", "cutoff", "reason"),
    [
        (10_000, 20, 32, "too_long"),  # the rule would leave no token of the response
        (30, 25, 5, "too_long"),  # the prompt would be its header alone
    ],
)
def test_never_an_empty_response_nor_an_empty_prompt(prompt_tokens, response_tokens, cutoff, reason):
    with pytest.raises(RecordProblem) as problem:
        cut([prompt(prompt_tokens)], ids(100, response_tokens), ids(200, 3), cutoff)
    assert problem.value.reason == reason


def test_a_question_is_cut_in_front_of_what_follows_it():
    """Two prompts begin with the same question of 50 tokens and go on with 10 and 14 of their own."""
    prompts = [np.concatenate([ids(0, 50), ids(300 + 50 * d, n), HEADER]) for d, n in enumerate((10, 14))]
    kept = cut_pairs(
        prompts, ids(100, 12), ids(200, 5), cutoff=40, rule="proportional", header=HEADER, ends=[10 + 3, 14 + 3]
    ).prompts
    assert [len(p) for p in kept] == [28, 28]
    np.testing.assert_array_equal(kept[0], np.concatenate([ids(0, 15), ids(300, 10), HEADER]))
    np.testing.assert_array_equal(kept[1], np.concatenate([ids(0, 11), ids(350, 14), HEADER]))
    with pytest.raises(RecordProblem) as problem:
        cut_pairs(prompts, ids(100, 12), ids(200, 5), cutoff=29, rule="proportional", header=HEADER, ends=[13, 17])
    assert problem.value.reason == "too_long"


def test_responses_that_agree_up_to_the_cut():
    chosen, rejected = ids(100, 40), ids(100, 40)
    rejected[30:] += 1000
    assert len(cut([prompt(5)], chosen, rejected, 40).chosen[0]) == 35
    with pytest.raises(RecordProblem) as problem:
        cut([prompt(5)], chosen, rejected, 35)
    assert problem.value.reason == "identical_when_cut"


def test_drop():
    assert cut([prompt(10)], ids(100, 22), ids(200, 5), 32, "drop").responses_cut == 0
    with pytest.raises(RecordProblem) as problem:
        cut([prompt(5), prompt(10)], ids(100, 23), ids(200, 5), 32, "drop")
    assert problem.value.reason == "over_cutoff"


def test_a_prompt_with_another_end_is_not_cut():
    with pytest.raises(RecordProblem, match="encoded in another way"):
        cut([ids(0, 60)], ids(100, 5), ids(200, 5), 32)
