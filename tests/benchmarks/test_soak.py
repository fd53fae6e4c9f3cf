"""What the soak takes for a fault among exit codes."""

import pytest

from benchmarks.forked_runs import Phase
from benchmarks.soak import wrong_codes

TERM, KILL, ALL = "SIGTERM to one rank", "SIGKILL to one rank", "SIGKILL to all ranks"


@pytest.mark.parametrize(
    ("manner", "phase", "codes", "is_over", "is_wrong"),
    [
        (TERM, Phase.STEP, {0: 75, 1: 75}, False, False),
        (TERM, Phase.SAVE, {0: 75, 1: 1}, False, True),
        (TERM, Phase.STEP, {0: 0, 1: 0}, False, True),
        (TERM, Phase.STEP, {0: 0, 1: 0}, True, False),
        (TERM, Phase.START, {0: -15, 1: -15}, False, False),
        (KILL, Phase.STEP, {0: -9, 1: 1}, False, False),
        (KILL, Phase.SAVE, {0: -9, 1: 2}, False, True),
        (KILL, Phase.SAVE, {0: -9, 1: 0}, False, True),
        (ALL, Phase.SAVE, {0: -9, 1: -9}, False, False),
    ],
)
def test_wrong_codes(manner, phase, codes, is_over, is_wrong):
    victim = None if manner == ALL else 0
    assert (wrong_codes(manner, phase, codes, victim, is_over=is_over) is not None) == is_wrong
