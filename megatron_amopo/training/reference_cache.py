"""Where reference log-probabilities lie, and whether those that lie there are this run's.

A new run's reference is its own starting weights: once they are loaded their fingerprint says which numbers are wanted,
and ``training/reference.py`` computes what isn't there. A resumed run has other weights by then; it wants the numbers
that ``run.json`` says it began with, and never computes any. ``--amopo-reference-cache`` names the folder of one
reference. Without the flag they lie beside the data, in ``DATA.reference/``, each under a name of its own.
"""

from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_amopo.checkpoint.iterations import holds_checkpoint, iteration_folder, tracked
from megatron_amopo.checkpoint.megatron import RELEASE
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.reference import OtherFormat, ReferenceIdentity, ReferenceLogps, holds_reference, read_identity
from megatron_amopo.errors import CheckpointError, ConfigError
from megatron_amopo.objectives import ObjectiveConfig

if TYPE_CHECKING:
    from megatron_amopo.training.arguments import RunConfig

_FLAG = "--amopo-reference-cache"


def add_reference_arguments(group: Any) -> None:
    """Add the flag to an argument group or parser."""
    group.add_argument(
        _FLAG,
        type=Path,
        metavar="DIR",
        help="reference log-probabilities of dpo, ipo and modpo: read from here, or computed at the start from the "
        "starting weights and kept here (default: in DATA.reference, beside the prepared data)",
    )


def check_reference_flags(args: Namespace, objective: ObjectiveConfig) -> None:
    """Whether a cache that was named would be read, and can be one.

    Raises:
        ConfigError: naming the flag.
    """
    folder: Path | None = args.amopo_reference_cache
    if folder is None:
        return
    if not objective.needs_reference:
        raise ConfigError(
            f"{_FLAG}: --amopo-pairwise {objective.flags['--amopo-pairwise']} reads no reference log-probabilities; "
            "leave it out"
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{_FLAG} {folder}: a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not holds_reference(folder):
        raise ConfigError(
            f"{_FLAG} {folder} holds something else than reference log-probabilities; name another folder"
        )


def find_reference(config: "RunConfig", wanted: ReferenceIdentity) -> ReferenceLogps | None:
    """The wanted numbers, if they are there.

    Raises:
        AmopoError: the named folder holds others, or what is there is damaged.
    """
    manifest = Manifest.load(config.data)
    if config.reference_cache is not None:
        if not holds_reference(config.reference_cache):
            return None
        found = ReferenceLogps.open(config.reference_cache, manifest)
        if why := found.identity.why_not(wanted):
            raise CheckpointError(
                f"{_FLAG} {config.reference_cache} {why}. Name another folder, and a new run computes its own"
            )
        return found
    for folder in _beside_data(config):
        with suppress(OtherFormat):  # left there for the version that reads it
            if read_identity(folder).why_not(wanted) is None:
                return ReferenceLogps.open(folder, manifest)
    return None


def new_reference_folder(config: "RunConfig", identity: ReferenceIdentity) -> Path:
    """Where the numbers are to be written that aren't there yet."""
    return config.reference_cache or _place_beside_data(config) / identity.folder_name


def is_resumed(args: Namespace) -> bool:
    """Whether ``--load`` holds weights that a run has trained, and this run goes on from them."""
    if args.load is None or args.finetune or not holds_checkpoint(Path(args.load)):
        return False
    named = tracked(Path(args.load))
    return named is None or named.name not in (RELEASE, iteration_folder(named.parent, 0).name)


def resumed_reference(args: Namespace, config: "RunConfig") -> ReferenceLogps | None:
    """What a resumed run's objective reads; None for one that needs no reference, and for a new run.

    Raises:
        AmopoError: it isn't there, or isn't the one that the run began with.
    """
    if not config.objective.needs_reference or not is_resumed(args):
        return None
    from megatron_amopo.training.run_record import recorded_reference

    wanted = recorded_reference(Path(args.load))
    found = find_reference(config, wanted)
    if found is None:
        folder = config.reference_cache or _place_beside_data(config)
        raise CheckpointError(
            f"{_FLAG} {folder} doesn't hold the reference log-probabilities that the run in {args.load} began with "
            f"(weights {wanted.weights}); trained weights can't give them. Put them back, or compute them again from "
            "the weights that it started from: the run's flags without --load and --save, with --skip-train"
        )
    return found


def check_named_cache(config: "RunConfig") -> None:
    """Before a new run has loaded anything: whether the numbers in the folder that was named can be its own.

    Raises:
        AmopoError: they are of other data, another precision or lack a dimension, or are damaged.
    """
    folder = config.reference_cache
    if folder is not None and config.reference is None and holds_reference(folder):
        find_reference(config, wanted_identity(config, read_identity(folder).weights))


def wanted_identity(config: "RunConfig", weights: str) -> ReferenceIdentity:
    """What a new run wants that starts from weights of this fingerprint."""
    return ReferenceIdentity(
        weights, config.model_config_sha256, config.data_sha256, config.precision, config.dimensions
    )


def _place_beside_data(config: "RunConfig") -> Path:
    data = config.data.resolve()
    return data.with_name(f"{data.name}.reference")


def _beside_data(config: "RunConfig") -> list[Path]:
    place = _place_beside_data(config)
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if not path.name.startswith(".") and holds_reference(path))
