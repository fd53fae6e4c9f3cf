"""What every test may rely on: seeded random numbers, and GPU tests skipped without a GPU."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEED = 20250607


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whichever ran before it."""
    random.seed(SEED)
    # Only what is loaded already: tests of the set-up and of the command lines need not wait for torch.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
