"""Reference log-probabilities on the disk: what a frozen model says of every response of prepared data.

Losses with a reference model (DPO, IPO, MODPO) read one number per response that never changes: Σ log p under the
reference. It is computed once (``training/reference_pass.py``), kept in a folder and read from there, so that no second
model is in memory. The folder holds ``reference.json``, which says of what weights and data the numbers are, and one
``SPLIT.npy`` for each split, float32 ``[N, D, 2]``: N records in the order of the prepared data, D dimensions in that
of ``reference.json``, chosen and rejected.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_amopo.data.manifest import Manifest
from megatron_amopo.errors import DataError

FORMAT_VERSION = 2
REFERENCE_FILE = "reference.json"


class OtherFormat(DataError):
    """Reference log-probabilities that this version doesn't read."""


@dataclass(frozen=True)
class ReferenceIdentity:
    """What reference log-probabilities depend on. The layout that computed them changes their rounding alone."""

    weights: str  # fingerprint of model/fingerprint.py
    model_config_sha256: str  # of what config.json says beside the weights: norms, rotary embedding, heads
    data_sha256: str  # of the data's manifest
    precision: str  # that the model computed in: float32, bfloat16 or fp8-RECIPE
    dimensions: tuple[str, ...]

    def why_not(self, wanted: "ReferenceIdentity") -> str | None:
        """Why numbers of this identity can't stand for the wanted ones; None if they can: they may have more
        dimensions, in another order.
        """
        for name, what in (
            ("weights", "other weights"),
            ("model_config_sha256", "another config.json"),
            ("data_sha256", "other data"),
        ):
            has, wants = getattr(self, name), getattr(wanted, name)
            if has != wants:
                return f"is of {what} ({name.removesuffix('_sha256')} {has[:16]}, this run's {wants[:16]})"
        if self.precision != wanted.precision:
            return f"was computed in {self.precision}, this run computes in {wanted.precision}"
        if missing := [name for name in wanted.dimensions if name not in self.dimensions]:
            return f"lacks dimension(s) {', '.join(missing)}; it has {', '.join(self.dimensions)}"
        return None

    @property
    def folder_name(self) -> str:
        """One name for each identity."""
        rest = hashlib.sha256("\n".join((self.model_config_sha256, *self.dimensions)).encode()).hexdigest()
        return f"{self.weights}-{self.data_sha256[:16]}-{self.precision}-{rest[:8]}"

    @classmethod
    def from_json(cls, content: Any) -> "ReferenceIdentity":
        """The identity that ``asdict`` and JSON made ``content`` of. Raises KeyError or TypeError for anything else."""
        values = {f.name: content[f.name] for f in fields(cls)}
        names = values.pop("dimensions")
        texts = [*values.values(), *names]
        if isinstance(names, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("not an identity of reference log-probabilities")
        return cls(dimensions=tuple(names), **values)


@dataclass(frozen=True)
class ReferenceLogps:
    """A folder of reference log-probabilities, checked. Build it with :meth:`open`."""

    folder: Path
    identity: ReferenceIdentity

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> "ReferenceLogps":
        """Check that ``folder`` holds whole numbers for the data of ``manifest``, if the identity is of that data.

        Raises:
            DataError: naming the file that is missing or damaged.
        """
        found = cls(folder, read_identity(folder))
        if found.identity.data_sha256 == manifest.data_sha256:
            for split, records in manifest.records.items():
                if records and found._mapped(split).shape != (records, len(found.identity.dimensions), 2):
                    raise DataError(
                        f"{folder / f'{split}.npy'} is damaged: it doesn't hold {records} records of "
                        f"{len(found.identity.dimensions)} dimensions; remove {folder}, and a new run computes it again"
                    )
        return found

    def logps(self, split: str, dimensions: Sequence[str]) -> np.ndarray:
        """Σ log p of each response of a split, ``[N, D, 2]`` float32, nats; mapped, unless some dimensions alone are
        asked for.
        """
        mapped = self._mapped(split)
        if tuple(dimensions) == self.identity.dimensions:
            return mapped
        return mapped[:, [self.identity.dimensions.index(name) for name in dimensions]]

    def _mapped(self, split: str) -> np.ndarray:
        path = self.folder / f"{split}.npy"
        try:
            array = np.asarray(np.load(path, mmap_mode="r"))
            if array.dtype != np.float32:
                raise ValueError(f"it holds {array.dtype}")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path} is damaged or missing ({error}); remove {self.folder}, and a new run computes it again"
            ) from error
        return array


def holds_reference(folder: Path) -> bool:
    """Whether a folder is one of reference log-probabilities."""
    return (folder / REFERENCE_FILE).is_file()


def read_identity(folder: Path) -> ReferenceIdentity:
    """What the numbers in ``folder`` are of.

    Raises:
        OtherFormat: another version of this project wrote it.
        DataError: ``reference.json`` can't be read or understood.
    """
    path = folder / REFERENCE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise OtherFormat(
                f"{path} has format {content['format_version']}, this version of megatron-amopo reads "
                f"{FORMAT_VERSION}; remove {folder}, and a new run computes it again"
            )
        return ReferenceIdentity.from_json(content)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} says nothing of reference log-probabilities ({error!r})") from error


def write_reference(folder: Path, identity: ReferenceIdentity, logps: Mapping[str, np.ndarray]) -> None:
    """Write the numbers of all splits into an empty folder, which is still private to its writer."""
    for split, values in logps.items():
        assert values.dtype == np.float32
        np.save(folder / f"{split}.npy", values)
    record = {"format_version": FORMAT_VERSION, **asdict(identity)}
    (folder / REFERENCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
