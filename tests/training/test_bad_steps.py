"""What a bad step says of its records."""

import math

from megatron_amopo.training.bad_steps import BadStep, worst_losses


def test_a_record_twice_in_a_batch_keeps_its_worse_loss():
    nan, infinite = math.nan, math.inf
    for first, second in (([1, 2, 3], [1, 2, 3]), ([3, 2, 1], [1, 3, 2])):
        losses = {1: (nan, 0.5), 2: (2.0, infinite), 3: (0.25, 4.0)}
        found = worst_losses([(first, [losses[r][0] for r in first]), (second, [losses[r][1] for r in second])])
        assert math.isnan(found[1])
        assert (found[2], found[3]) == (infinite, 4.0)
    assert math.isnan(worst_losses([([1], [0.5]), ([1], [nan])])[1])
    assert set(BadStep("", 0.0, 0.0, found).suspects) == {1, 2}
