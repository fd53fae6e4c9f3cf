"""Runs that start from a Hugging Face folder and leave one."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from megatron_amopo.checkpoint.convert import megatron_to_hf
from megatron_amopo.checkpoint.logits import compare_logits
from megatron_amopo.checkpoint.verify import verify
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.model_prompts import ModelPrompts
from megatron_amopo.data.prompts import DEFAULT_STYLE, PromptStyle
from tests.distributed.test_model import separate_logps
from tests.distributed.test_runs import flags
from tests.support.checkpoints import all_files, load_tensors
from tests.support.jobs import command

TOLERANCE = 1e-5  # nats per token


def start(place, cache, *extra):
    """The flags of test_runs with a Hugging Face folder in the checkpoint's place."""
    own = flags(place, "--tensor-model-parallel-size", "2", *extra)
    at = own.index("--pretrained-checkpoint")
    own[at : at + 2] = ["--amopo-hf-model", str(place.hf), "--amopo-hf-cache", str(cache)]
    return own


def with_prompts(data, target):
    """A copy of prepared groups that says which prompts they are of."""
    shutil.copytree(data, target)
    manifest = Manifest.load(target)
    replace(manifest, prompts=PromptStyle.load(DEFAULT_STYLE).content).save(target)
    return target


def test_from_one_folder_to_another(ranks, workplace, tmp_path):
    """Import, stop early, resume without the import, export, and what transformers says of the exported model."""
    cache, save, aligned, dump = (tmp_path / name for name in ("cache", "run", "aligned", "logps.jsonl"))
    workplace = replace(workplace, data=with_prompts(workplace.data, tmp_path / "data"))
    run = ["--save", str(save), "--load", str(save), "--train-iters", "4", "--amopo-export-hf", str(aligned)]
    first = ranks.run(command, 2, start(workplace, cache, *run, "--exit-interval", "2"))
    assert [code for code, _, _ in first] == [75, 75]
    assert sum("> importing" in printed for _, printed, _ in first) == 1
    assert "> stopped by a limit of its flags after step 2 of 4, which is saved" in first[0][1]
    assert not aligned.exists()
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    assert not any(row.differing for row in verify(workplace.hf, entry))
    assert not list((save / "hf").glob("*.safetensors"))  # config and tokenizer, not the weights

    elsewhere = tmp_path / "unused"
    resumed = ranks.run(command, 2, start(workplace, elsewhere, *run, "--amopo-dump-logps", str(dump)))
    assert [code for code, _, _ in resumed] == [0, 0]
    assert not elsewhere.exists()
    size = sum(tensor.nbytes for tensor in load_tensors(aligned).values())
    assert re.search(rf"> exported step 4 to {aligned}: \d+ tensors, {size:,} bytes, [\d.]+ s", resumed[0][1])
    assert "exported" not in resumed[1][1]

    prompts = ModelPrompts.load(aligned)
    assert prompts is not None
    assert prompts.dimensions == ("quality_1", "quality_2")
    assert prompts.trained == ("general", "quality_1", "quality_2")
    assert "> note: there is no chat template" in resumed[0][1]  # the tiny model has no tokenizer

    model = AutoModelForCausalLM.from_pretrained(aligned).float().eval()
    groups = PreparedGroups.open(workplace.data, "validation")
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    assert len(lines) == 3 * len(groups)
    for index in range(len(groups)):
        group = groups[index]
        lengths = [n for d in range(3) for n in (len(group.chosen[d]), len(group.rejected[d]))]
        expected = [part.sum().item() / len(part) for part in separate_logps(model, [group]).split(lengths)]
        dumped = [
            line[side] / line[f"{side}_length"]
            for line in lines[3 * index : 3 * index + 3]
            for side in ("chosen", "rejected")
        ]
        assert dumped == pytest.approx(expected, abs=TOLERANCE)

    (both,) = ranks.run(compare_logits, 1, aligned, save)  # vocabulary padded for two ranks, loaded by one
    assert both.within(1e-6)

    ended = ranks.run(command, 2, start(workplace, cache, *run))
    assert [code for code, _, _ in ended] == [0, 0]
    assert f"> exported already: {aligned} holds the weights of step 4, bit by bit" in ended[0][1]
    before = next(aligned.glob("*.safetensors")).read_bytes()
    next(aligned.glob("*.safetensors")).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    code, _, said = ranks.run(command, 2, start(workplace, cache, *run))[0]
    assert code == 2
    assert re.search(
        rf"--amopo-export-hf {aligned} holds other weights \(1 tensors differ, such as \S+\); step 4", said
    )
    next(aligned.glob("*.safetensors")).write_bytes(before)

    # A run that is complete exports again; a failed export leaves its checkpoint alone and says how to go on.
    aligned.rename(tmp_path / "before")
    record = (save / "hf" / "weights.json").rename(tmp_path / "weights.json")
    (save / "hf" / "weights.json").write_text("{}")
    code, _, said = ranks.run(command, 2, start(workplace, cache, *run))[0]
    assert code == 2
    assert f"error: --amopo-export-hf {aligned}: {save / 'hf' / 'weights.json'}: not a record" in said
    assert said.strip().endswith(f"tools/convert_checkpoint.py megatron-to-hf {save} {aligned}")
    assert not aligned.exists()
    record.rename(save / "hf" / "weights.json")
    megatron_to_hf(save, aligned)
    assert all_files(aligned) == all_files(tmp_path / "before")


def test_the_second_run_finds_the_import(ranks, workplace, tmp_path):
    cache = tmp_path / "cache"
    times = []
    for name in ("one", "two"):
        own = ["--tensorboard-dir", str(tmp_path / name), "--skip-train", "--amopo-seed", "1"]
        results = ranks.run(command, 2, start(workplace, cache, *own))
        assert [code for code, _, _ in results] == [0, 0]
        times.append({path: path.stat().st_mtime_ns for path in cache.rglob("*")})
    assert times[0] == times[1]
    assert not any("> import" in printed for _, printed, _ in results)


def test_a_failed_import_is_said_once(ranks, workplace, tmp_path):
    """Two ranks, one damaged folder: both stop, and only the one that tried says why."""
    damaged = tmp_path / "damaged"
    shutil.copytree(workplace.hf, damaged)
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    own = start(workplace, tmp_path / "cache", "--save", str(tmp_path / "run"), "--train-iters", "1")
    own[own.index("--amopo-hf-model") + 1] = str(damaged)
    results = ranks.run(command, 2, own)
    assert [code for code, _, _ in results] == [2, 2]
    reasons = [said for _, _, said in results if str(weights) in said]
    assert len(reasons) in (1, 2)  # 2 where the second rank came after the first had failed
    assert all(said.startswith(f"error: --amopo-hf-model {weights}") for said in reasons)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
