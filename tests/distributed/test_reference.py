"""Losses with a reference model: its log-probabilities under every layout, a run against plain transformers, resuming,
and what is refused.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron_amopo.certification.comparison import hugging_face_tensors, relative_error
from megatron_amopo.certification.observed_run import metrics, train
from megatron_amopo.certification.reference import padded_rows, row_lengths
from megatron_amopo.certification.tiny import make_data, make_hf_model
from megatron_amopo.checkpoint.convert import hf_to_megatron
from megatron_amopo.checkpoint.families import parameter_table
from megatron_amopo.checkpoint.hf import read_config
from megatron_amopo.data.batching import SampleOrder
from megatron_amopo.data.dataset import PreparedGroups
from tests.support.jobs import command

TOLERANCE = 1e-5
SEED = 7
BETA = 0.1
SGD = ["--optimizer", "sgd", "--sgd-momentum", "0"]
NAMES = ("general", "quality_1", "quality_2")
MODPO = ["--amopo-modpo-weights", "quality_1=0.3,quality_2=0.7", "--amopo-modpo-objective", "quality_2"]
TP2, PP2, CP2 = (
    [f"--{kind}-model-parallel-size" if kind != "context" else "--context-parallel-size", "2"]
    for kind in ("tensor", "pipeline", "context")
)


@pytest.fixture(scope="module")
def place(workplace, tmp_path_factory):
    """The model of all tests, data with scores."""
    place = replace(workplace, data=tmp_path_factory.mktemp("scored") / "data")
    make_data(place.data, random_scores=True)
    return place


def flags(place, *extra: str, pairwise: str = "dpo") -> list[str]:
    return [
        "--amopo-data", str(place.data), "--pretrained-checkpoint", str(place.mcore), "--amopo-pairwise", pairwise,
        "--micro-batch-size", "2", "--global-batch-size", "8", "--log-interval", "1", "--amopo-seed", str(SEED),
        "--lr", "0.05", "--lr-decay-style", "constant", "--weight-decay", "0", "--clip-grad", "0",
        *extra,
    ]  # fmt: skip


def batch_sums(model, groups):
    """Σ log p of each response, [G, D, 2], by transformers on padded rows."""
    ids, labels = padded_rows(groups)
    mask = (torch.arange(ids.shape[1]) < row_lengths(groups)[:, None]).long()
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    taken = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (taken * (targets >= 0)).sum(1).view(len(groups), -1, 2)


def load(folder: Path):
    return {split: np.load(folder / f"{split}.npy") for split in ("train", "validation")}


@pytest.fixture(scope="module")
def one_rank(ranks, place, tmp_path_factory):
    """The cache that one rank leaves when nothing is trained."""
    cache = tmp_path_factory.mktemp("one-rank") / "cache"
    own = ["--skip-train", "--amopo-reference-cache", str(cache)]
    ((code, printed, errors),) = ranks.run(command, 1, flags(place, *own))
    assert code == 0, errors
    assert "> reference log-probabilities: 24 of 24 train records" in printed
    assert "> reference log-probabilities: 10 of 10 validation records" in printed
    return cache


def test_one_rank_equals_transformers(place, one_rank):
    model = AutoModelForCausalLM.from_pretrained(place.hf, dtype=torch.float64).eval()
    for split, values in load(one_rank).items():
        groups = PreparedGroups.open(place.data, split)
        assert values.dtype == np.float32
        with torch.no_grad():
            expected = batch_sums(model, [groups[i] for i in range(len(groups))]).numpy()
        np.testing.assert_allclose(values, expected, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, TP2),
        (2, [*TP2, "--sequence-parallel"]),
        (2, PP2),
        (2, []),
        (2, ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]),
        (4, TP2 + CP2),
        (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    ],
    ids=["tp2", "tp2-sp", "pp2", "dp2", "dp2-overlap", "tp2-cp2", "pp2-vpp2"],
)
def test_layouts_agree_with_one_rank_and_with_their_own_policy(num_ranks, layout, ranks, place, one_rank, tmp_path):
    """One step from scratch: the same identity and numbers as one rank's, and a policy that is its reference: a loss of
    log 2 in the first step and on the validation set before it.
    """
    cache, run = tmp_path / "cache", tmp_path / "run"
    own = ["--train-iters", "1", "--tensorboard-dir", str(run), "--amopo-eval-at-start", *layout]
    base = flags(place, *own, "--amopo-reference-cache", str(cache))
    results = ranks.run(command, num_ranks, base)
    assert [code for code, _, _ in results] == [0] * num_ranks, results[0][2]
    assert (cache / "reference.json").read_text() == (one_rank / "reference.json").read_text()
    for split, values in load(cache).items():
        np.testing.assert_allclose(values, load(one_rank)[split], rtol=TOLERANCE)
    for first in (metrics(run)[0], metrics(run, "validation")[0]):
        assert [first[f"loss/{name}"] for name in NAMES] == pytest.approx([math.log(2)] * 3, abs=1e-6)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def plain_losses(pairwise, sums, reference, lengths, scores):
    """[G, D] by the formulas; scores [G, K, 2]."""
    ratios = sums - reference
    if pairwise == "ipo":
        mean = ratios / lengths
        return (mean[..., 0] - mean[..., 1] - 1 / (2 * BETA)) ** 2
    rewards = BETA * (ratios[..., 0] - ratios[..., 1])
    if pairwise == "modpo":
        rewards = (rewards - 0.3 * (scores[:, 0, 0] - scores[:, 0, 1])[:, None]) / 0.7
    return -F.logsigmoid(rewards)


@pytest.mark.parametrize("pairwise", ["dpo", "ipo", "modpo"])
def test_training_equals_plain_transformers(pairwise, ranks, place, one_rank, tmp_path):
    """Three steps of SGD on one cache, against transformers in float64 with the formula written out."""
    own = ["--train-iters", "3", "--tensorboard-dir", str(tmp_path), "--amopo-weighting", "uniform", *SGD]
    own += ["--amopo-reference-cache", str(one_rank), *(MODPO if pairwise == "modpo" else [])]
    (run,) = ranks.run(train, 1, flags(place, *own, pairwise=pairwise))
    assert f"> reference log-probabilities: of {one_rank}" in run.printed

    groups = PreparedGroups.open(place.data)
    model = AutoModelForCausalLM.from_pretrained(place.hf, dtype=torch.float64).eval()
    parameters = dict(model.named_parameters())
    records = [SampleOrder(len(groups), SEED)(range(8 * step, 8 * step + 8))[0] for step in range(3)]
    with torch.no_grad():
        references = [batch_sums(model, [groups[int(i)] for i in indices]) for indices in records]
    losses, first = [], {}
    for indices, reference in zip(records, references, strict=True):
        own_groups = [groups[int(i)] for i in indices]
        lengths = torch.tensor(
            [[[len(c), len(r)] for c, r in zip(g.chosen, g.rejected, strict=True)] for g in own_groups]
        )
        scores = torch.from_numpy(np.stack([np.stack(groups.scores(int(i)), axis=-1) for i in indices])).double()
        loss = plain_losses(pairwise, batch_sums(model, own_groups), reference, lengths, scores).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        losses.append(loss.item())
        first = first or dict(zip(parameters, gradients, strict=True))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= 0.05 * gradient
    assert [step["loss"] for step in metrics(tmp_path)] == pytest.approx(losses, rel=TOLERANCE)
    assert len({round(loss, 4) for loss in losses}) == 3  # the reference stays where the policy was
    named = hugging_face_tensors(parameter_table(read_config(place.hf)), run.gradients)
    assert relative_error(named, {name: first[name] for name in named}) <= TOLERANCE


def test_resume_reads_what_the_run_began_with(ranks, place, tmp_path):
    """Four steps straight against two, stop, two: bitwise, whether the cache was computed or found. Without it nothing
    is resumed.
    """
    runs = {}
    for name, stops in (("straight", [[]]), ("resumed", [["--exit-interval", "2"], []])):
        save = tmp_path / name
        for stop in stops:
            own = ["--save", str(save), "--load", str(save), "--train-iters", "4", *stop]
            runs[name] = ranks.run(train, 2, flags(place, *own))[0]
    (entry,) = Path(f"{place.data}.reference").iterdir()  # beside the data, made by the first run
    assert f"> reference log-probabilities: of {entry}" not in runs["straight"].printed
    assert runs["resumed"].weights.keys() == runs["straight"].weights.keys()
    assert all(torch.equal(runs["resumed"].weights[name], tensor) for name, tensor in runs["straight"].weights.items())
    recorded = json.loads((tmp_path / "resumed" / "run.json").read_text())["reference"]
    assert recorded | {"format_version": 2} == json.loads((entry / "reference.json").read_text())

    gone = entry.rename(tmp_path / "gone")
    again = flags(place, "--save", str(save), "--load", str(save), "--train-iters", "4")
    code, _, said = ranks.run(command, 1, again)[0]
    assert code == 2
    assert f"--amopo-reference-cache {place.data}.reference doesn't hold the reference log-probabilities" in said
    assert not any(Path(f"{place.data}.reference").iterdir())
    # Wherever they are put, they can be named.
    code, _, said = ranks.run(command, 1, [*again, "--amopo-reference-cache", str(gone)])[0]
    assert code == 0, said
    record = json.loads((save / "run.json").read_text())
    del record["reference"]["model_config_sha256"]
    (save / "run.json").write_text(json.dumps(record))
    code, _, said = ranks.run(command, 1, [*again, "--amopo-reference-cache", str(gone)])[0]
    assert code == 2
    assert "run.json was written by an older version of megatron-amopo" in said
    (save / "run.json").unlink()
    code, _, said = ranks.run(command, 1, [*again, "--amopo-reference-cache", str(gone)])[0]
    assert code == 2
    assert "run.json doesn't say which reference model its run began with" in said


def test_a_subset_of_dimensions_reads_its_own_columns(ranks, place, one_rank, tmp_path):
    own = ["--train-iters", "1", "--tensorboard-dir", str(tmp_path), "--amopo-dimensions", "quality_2,general"]
    ranks.run(train, 1, flags(place, *own, "--amopo-reference-cache", str(one_rank)), want_tensors=False)
    (step,) = metrics(tmp_path)
    assert [step[f"loss/{name}"] for name in ("quality_2", "general")] == pytest.approx([math.log(2)] * 2, abs=1e-6)


@pytest.fixture
def other(place, tmp_path):
    """The same model but for one element of one weight."""
    folder = tmp_path / "other"
    model = make_hf_model(folder / "hf")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] += 1e-3
    model.save_pretrained(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "mcore")
    return folder / "mcore"


def test_another_checkpoint_or_other_data_is_refused(ranks, place, one_rank, other, tmp_path):
    base = ["--train-iters", "1", "--amopo-reference-cache", str(one_rank)]
    before = load(one_rank)
    wrong_weights = ranks.run(command, 2, flags(replace(place, mcore=other), *base))
    assert [code for code, _, _ in wrong_weights] == [2, 2]
    assert wrong_weights[0][2].startswith(f"error: --amopo-reference-cache {one_rank} is of other weights (weights ")

    make_data(tmp_path / "data", random_scores=True, seed=8)
    changed = replace(place, data=tmp_path / "data")
    shutil.copytree(place.mcore, tmp_path / "mcore")
    config = json.loads((place.mcore / "hf" / "config.json").read_text())
    (tmp_path / "mcore" / "hf" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    for where, extra, message in (
        (changed, [], "is of other data (data "),
        (replace(place, mcore=tmp_path / "mcore"), [], "is of another config.json (model_config "),
        (place, ["--bf16"], "was computed in float32, this run computes in bfloat16"),
    ):
        code, printed, said = ranks.run(command, 1, flags(where, *base, *extra))[0]
        assert code == 2
        assert f"error: --amopo-reference-cache {one_rank} {message}" in said
        assert "initialized tensor model parallel" not in printed  # said before anything is loaded
    assert all((before[split] == values).all() for split, values in load(one_rank).items())


def test_beside_the_data_each_checkpoint_has_its_own(ranks, place, other, tmp_path):
    """Nothing that another checkpoint left is read, and a damaged entry is named."""
    own = replace(place, data=tmp_path / "data")
    shutil.copytree(place.data, own.data)
    for model in (place.mcore, other):
        results = ranks.run(command, 1, flags(replace(own, mcore=model), "--skip-train"))
        assert results[0][0] == 0, results[0][2]
    entries = sorted(Path(f"{own.data}.reference").iterdir())
    assert len(entries) == 2
    assert not np.array_equal(load(entries[0])["train"], load(entries[1])["train"])
    older = entries[0].parent / "0-older"  # which is looked at first
    older.mkdir()
    (older / "reference.json").write_text('{"format_version": 1}')
    for entry in entries:
        (entry / "train.npy").write_bytes((entry / "train.npy").read_bytes()[:-40])
    code, _, said = ranks.run(command, 1, flags(own, "--skip-train"))[0]
    assert code == 2
    assert "train.npy is damaged or missing" in said
