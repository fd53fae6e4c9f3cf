"""Ranks, a model and data for all distributed tests: made once."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_amopo.certification.observed_run import train
from megatron_amopo.certification.ranks import RankPool
from megatron_amopo.certification.tiny import make_data, make_hf_model
from megatron_amopo.checkpoint.convert import hf_to_megatron
from tests.distributed.layout_runs import flags


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder share ranks, which take a while to start."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.distributed)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@dataclass(frozen=True)
class Workplace:
    """A tiny model in both formats and prepared data with three dimensions."""

    hf: Path
    hf_untied: Path
    mcore: Path
    mcore_untied: Path
    data: Path


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("workplace")
    place = Workplace(root / "hf", root / "hf_untied", root / "mcore", root / "mcore_untied", root / "data")
    make_hf_model(place.hf)
    make_hf_model(place.hf_untied, tied=False, seed=1)
    hf_to_megatron(place.hf, place.mcore)
    hf_to_megatron(place.hf_untied, place.mcore_untied)
    make_data(place.data)
    return place


@pytest.fixture(scope="session")
def one_rank(ranks, workplace, tmp_path_factory):
    """Runs of one rank, by (tied, optimizer), each made once."""
    runs = {}

    def get(*, tied: bool, optimizer: list[str]):
        key = (tied, tuple(optimizer))
        if key not in runs:
            save = tmp_path_factory.mktemp("one-rank")
            runs[key] = (ranks.run(train, 1, flags(workplace, save, *optimizer, tied=tied))[0], save)
        return runs[key]

    return get
