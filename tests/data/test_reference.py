"""The folder of reference log-probabilities: what was written comes back, and whatever doesn't fit is said."""

import re
from dataclasses import replace

import numpy as np
import pytest

from megatron_amopo.certification.tiny import make_data
from megatron_amopo.data.reference import ReferenceIdentity, ReferenceLogps, holds_reference, write_reference
from megatron_amopo.errors import DataError

NAMES = ("general", "quality_1", "quality_2")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "data", train=5, validation=2)


@pytest.fixture
def written(manifest, tmp_path):
    identity = ReferenceIdentity("0123456789abcdef", "c" * 64, manifest.data_sha256, "float32", NAMES)
    rng = np.random.default_rng(0)
    logps = {split: -rng.random((count, 3, 2), np.float32) for split, count in (("train", 5), ("validation", 2))}
    folder = tmp_path / "reference"
    folder.mkdir()
    assert not holds_reference(folder)
    write_reference(folder, identity, logps)
    return folder, identity, logps


def test_what_was_written_comes_back(written, manifest):
    folder, identity, logps = written
    assert holds_reference(folder)
    found = ReferenceLogps.open(folder, manifest)
    assert found.identity == identity
    for split, values in logps.items():
        read = found.logps(split, NAMES)
        assert isinstance(read.base, np.memmap)
        assert np.array_equal(read, values)
        assert np.array_equal(found.logps(split, ["quality_2", "general"]), values[:, [2, 0]])


def test_what_may_stand_for_what(written):
    _, identity, _ = written
    assert identity.why_not(identity) is None
    assert identity.why_not(replace(identity, dimensions=("quality_1", "general"))) is None
    for change, message in (
        ({"weights": "f" * 16}, "other weights (weights 0123456789abcdef, this run's ffffffffffffffff)"),
        ({"model_config_sha256": "f" * 64}, "another config.json (model_config cccccccccccccccc, this run's ffff"),
        ({"data_sha256": "f" * 64}, "other data (data "),
        ({"precision": "bfloat16"}, "was computed in float32, this run computes in bfloat16"),
        ({"dimensions": ("general", "beauty")}, "lacks dimension(s) beauty; it has general, quality_1, quality_2"),
    ):
        wanted = replace(identity, **change)
        assert message in identity.why_not(wanted)
        assert wanted.folder_name != identity.folder_name


def damage(folder, what):
    if what == "gone":
        (folder / "validation.npy").unlink()
    elif what == "cut":
        (folder / "train.npy").write_bytes((folder / "train.npy").read_bytes()[:-4])
    elif what == "fewer":
        np.save(folder / "train.npy", np.zeros((4, 3, 2), np.float32))
    elif what == "double":
        np.save(folder / "train.npy", np.zeros((5, 3, 2)))
    else:
        (folder / "reference.json").write_text(what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gone", "validation.npy is damaged or missing"),
        ("cut", "train.npy is damaged or missing"),
        ("fewer", "train.npy is damaged: it doesn't hold 5 records of 3 dimensions"),
        ("double", "train.npy is damaged or missing (it holds float64)"),
        ("{", "reference.json says nothing of reference log-probabilities"),
        ("[]", "reference.json says nothing of reference log-probabilities"),
        ('{"format_version": 1}', "reference.json has format 1, this version of megatron-amopo reads 2; remove"),
        (
            '{"format_version": 2, "weights": "a", "model_config_sha256": "c", "data_sha256": "b", "precision": 3, '
            '"dimensions": []}',
            "not an identity",
        ),
        (
            '{"format_version": 2, "weights": "a", "model_config_sha256": "c", "data_sha256": "b"}',
            "KeyError('precision')",
        ),
    ],
)
def test_damage_is_named(written, manifest, what, message):
    folder, _, _ = written
    damage(folder, what)
    with pytest.raises(DataError, match=re.escape(message)):
        ReferenceLogps.open(folder, manifest)
