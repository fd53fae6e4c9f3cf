"""What a run was, kept beside its checkpoints, so that a resumed run is the same run.

Takes the configuration; gives ``run.json`` and ``hf/`` in the ``--save`` folder and, at the next start from there, an
error where data, dimensions, seed or objective differ, and the identity of the reference model that the run began with.
"""

import json
import os
import shutil
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.model_prompts import ModelPrompts
from megatron_amopo.data.reference import ReferenceIdentity
from megatron_amopo.errors import CheckpointError
from megatron_amopo.files import write_whole
from megatron_amopo.training.arguments import RunConfig
from megatron_amopo.training.checks import is_replaceable
from megatron_amopo.training.run_files import RUN_RECORD

_REFERENCE = "reference"


def run_record(config: RunConfig) -> dict[str, Any]:
    """What must not change within a run, by the names of the flags that set it."""
    return {
        "--amopo-data": config.data_sha256,
        "--amopo-dimensions": list(config.dimensions),
        **config.objective.flags,
        "--amopo-seed": config.noise_seed,
        # Epochs are counted in steps, so both must stay; without them a run may change its batch size.
        "--amopo-epochs": config.num_epochs,
        **({"--global-batch-size": config.global_batch_size} if config.num_epochs else {}),
    }


def write_run_record(folder: Path, config: RunConfig, reference: ReferenceIdentity | None = None) -> None:
    """Write ``run.json``, beside and renamed."""
    record = run_record(config) | ({} if reference is None else {_REFERENCE: asdict(reference)})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN_RECORD, json.dumps(record, indent=2) + "\n")


def describe_run_folder(folder: Path, config: RunConfig, reference: ReferenceIdentity | None) -> None:
    """Write what export and resume need beside the weights: config and tokenizer, the prompts, ``run.json``."""
    _copy_hf_folder(config.hf_folder, folder / "hf")
    prompts = ModelPrompts.of_run(Manifest.load(config.data), config.dimensions)
    if prompts is not None:
        prompts.save(folder / "hf")
    write_run_record(folder, config, reference)


def _copy_hf_folder(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    if not is_replaceable(target):  # check_outputs refused it: it appeared since
        raise CheckpointError(f"{target} holds somebody's model, and is left alone: name another --save")
    if target.exists():  # of a run that never saved
        shutil.rmtree(target)
    os.replace(partial, target)


def recorded_reference(folder: Path) -> ReferenceIdentity:
    """Of what weights and data the reference log-probabilities were that the run in ``folder`` began with.

    Raises:
        CheckpointError: it isn't said there.
    """
    path = folder / RUN_RECORD
    try:
        return ReferenceIdentity.from_json(json.loads(path.read_text())[_REFERENCE])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, KeyError) and error.args == ("model_config_sha256",):
            raise CheckpointError(
                f"{path} was written by an older version of megatron-amopo, which doesn't say of what config.json its "
                "reference is; finish the run with that version"
            ) from error
        raise CheckpointError(
            f"{path} doesn't say which reference model its run began with, and the trained weights are none. Start a "
            "new run from them with --finetune and another --save"
        ) from error


def check_resumed_run(args: Namespace, config: RunConfig) -> None:
    """Compare with the record in the ``--load`` folder, if a run is resumed from there.

    Raises:
        CheckpointError: naming what differs. ``--finetune`` starts a new run from the weights and isn't held to the
            record.
    """
    if args.load is None or args.finetune or not (path := Path(args.load) / RUN_RECORD).is_file():
        return
    before, now = json.loads(path.read_text()), run_record(config)
    before.pop(_REFERENCE, None)
    for flag in (*now, *(before.keys() - now.keys())):
        if before.get(flag) != now.get(flag):
            was = "other data" if flag == "--amopo-data" else before.get(flag)
            is_now = "" if flag == "--amopo-data" else f", now {now.get(flag)}"
            raise CheckpointError(
                f"{args.load} holds a run with another {flag} ({was}{is_now}). Resume with the same one, or start a "
                "new run from its weights with --finetune and another --save"
            )
