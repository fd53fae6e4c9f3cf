"""Whole runs: resume, epochs with an incomplete last batch, evaluation alone, bfloat16, noise under every layout, the
export.
"""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_amopo.certification.observed_run import metrics, train
from megatron_amopo.checkpoint.convert import megatron_to_hf
from megatron_amopo.checkpoint.verify import verify
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.objectives import record_noise
from tests.distributed.test_model import separate_logps

TIMING = {"records_per_s", "tokens_per_s"}


def flags(place, *extra: str) -> list[str]:
    return [
        "--amopo-data", str(place.data), "--pretrained-checkpoint", str(place.mcore),
        "--micro-batch-size", "2", "--global-batch-size", "8", "--log-interval", "1",
        "--lr", "1e-3", "--lr-decay-style", "cosine",
        "--lr-decay-iters", "10", "--lr-warmup-fraction", "0.1", "--min-lr", "0", "--clip-grad", "1.0", *extra,
    ]  # fmt: skip


def without_timing(lines):
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(2, ["--tensor-model-parallel-size", "2"]), (2, ["--use-distributed-optimizer"])],
    ids=["tp2", "dp2-distopt"],
)
def test_resume_is_the_run_that_was_never_stopped(ranks, workplace, tmp_path, num_ranks, layout):
    """Six steps straight against three, stop, resume, three: bitwise. 24 records, 8 a step: crosses the end of an
    epoch.
    """
    runs = {}
    for name, stops in (("straight", [[]]), ("resumed", [["--exit-interval", "3"], []])):
        save = tmp_path / name
        for stop in stops:
            own = ["--save", str(save), "--load", str(save), "--train-iters", "6", *stop]
            runs[name] = ranks.run(train, num_ranks, flags(workplace, *layout, *own))[0]
    assert (tmp_path / "resumed" / "iter_0000003").is_dir()
    assert equal(runs["resumed"].weights, runs["straight"].weights)
    assert without_timing(metrics(tmp_path / "resumed")) == without_timing(metrics(tmp_path / "straight"))


def test_resume_under_another_layout(ranks, workplace, tmp_path):
    """Two steps on DP 2 with the distributed optimizer, two on TP 2 × PP 2, two on CP 2: the losses of six steps on one
    rank.
    """
    reference, moved = tmp_path / "reference", tmp_path / "moved"
    ranks.run(train, 1, flags(workplace, "--save", str(reference), "--no-save-optim", "--train-iters", "6"))
    own = ["--save", str(moved), "--load", str(moved), "--train-iters", "6", "--use-distributed-optimizer"]
    tp2_pp2 = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    for num_ranks, layout in ((2, []), (4, tp2_pp2), (2, ["--context-parallel-size", "2"])):
        ranks.run(train, num_ranks, flags(workplace, *own, *layout, "--exit-interval", "2"), want_tensors=False)
    losses = [[step["loss"] for step in metrics(folder)] for folder in (moved, reference)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_epochs_end_with_what_is_left(ranks, workplace, tmp_path):
    """Two epochs of 24 records in steps of 20: two whole steps and one of eight records, on two ranks; nothing lost,
    nothing twice.
    """
    run = ["--save", str(tmp_path), "--no-save-optim", "--amopo-epochs", "2", "--global-batch-size", "20", "--lr", "0"]
    (told, _) = ranks.run(train, 2, [*flags(workplace), *run], want_tensors=False)
    steps = metrics(tmp_path)
    assert len(steps) == 3
    assert "2 epochs = 48 samples, 3 steps of 20 records; the last step has 8" in told.printed
    # With a learning rate of 0 every record has the same margins in both epochs, so their sums over the steps must be
    # twice the sums over all records once.
    once = tmp_path / "once"
    own = [
        "--save",
        str(once),
        "--no-save-optim",
        "--amopo-epochs",
        "1",
        "--global-batch-size",
        "24",
        "--micro-batch-size",
        "3",
        "--lr",
        "0",
    ]
    ranks.run(train, 1, [*flags(workplace), *own], want_tensors=False)
    (whole,) = metrics(once)
    for name in ("margin/general", "accuracy/quality_1", "logps_rejected/quality_2", "tokens_per_record"):
        total = sum(step[name] * count for step, count in zip(steps, (20, 20, 8), strict=True))
        assert total == pytest.approx(2 * 24 * whole[name], rel=1e-5, abs=1e-5), name


def test_evaluation_alone_and_its_dump(ranks, workplace, tmp_path):
    """--skip-train evaluates the ten validation records, not divisible by the batch, under DP 2 × CP 2; the dump equals
    transformers.
    """
    dump = tmp_path / "logps.jsonl"
    own = ["--skip-train", "--tensorboard-dir", str(tmp_path), "--amopo-dump-logps", str(dump)]
    ranks.run(train, 4, flags(workplace, *own, "--context-parallel-size", "2"), want_tensors=False)
    (summary,) = metrics(tmp_path, "validation", "evaluation.jsonl")

    groups = PreparedGroups.open(workplace.data, "validation")
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    assert [(line["record_id"], line["dimension"]) for line in lines] == [
        (int(record), name) for record in groups.record_ids for name in groups.dimensions
    ]
    model = AutoModelForCausalLM.from_pretrained(workplace.hf).float().eval()
    margins = []
    for index in range(len(groups)):
        group = groups[index]
        parts = separate_logps(model, [group]).split(
            [n for d in range(3) for n in (len(group.chosen[d]), len(group.rejected[d]))]
        )
        for d, line in enumerate(lines[3 * index : 3 * index + 3]):
            chosen, rejected = parts[2 * d].sum().item(), parts[2 * d + 1].sum().item()
            assert line["chosen"] == pytest.approx(chosen, abs=1e-4)
            assert line["rejected"] == pytest.approx(rejected, abs=1e-4)
            assert (line["chosen_length"], line["rejected_length"]) == (len(parts[2 * d]), len(parts[2 * d + 1]))
            if d == 0:
                margins.append(chosen / len(parts[0]) - rejected / len(parts[1]))
    assert summary["margin/general"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert summary["accuracy/general"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))


def test_bfloat16_follows_float32(ranks, workplace, tmp_path):
    for name, precision in (("float32", []), ("bfloat16", ["--bf16"])):
        own = [
            "--save",
            str(tmp_path / name),
            "--train-iters",
            "4",
            "--tensor-model-parallel-size",
            "2",
            "--use-distributed-optimizer",
        ]
        ranks.run(train, 2, flags(workplace, *own, *precision))
    wide, narrow = ([step["loss"] for step in metrics(tmp_path / name)] for name in ("float32", "bfloat16"))
    assert all(math.isfinite(loss) for loss in narrow)
    assert narrow == pytest.approx(wide, rel=0.02)
    assert narrow != wide


def test_a_subset_of_dimensions_draws_the_same_noise(ranks, workplace, tmp_path):
    """The weights of a run on two of three dimensions are the published formula on these two's own noise."""
    run = [
        "--tensorboard-dir",
        str(tmp_path),
        "--skip-train",
        "--train-iters",
        "1",
        "--amopo-dimensions",
        "general,quality_2",
        "--amopo-seed",
        "77",
    ]
    ranks.run(train, 1, flags(workplace, *run), want_tensors=False)
    (summary,) = metrics(tmp_path, "validation", "evaluation.jsonl")
    groups = PreparedGroups.open(workplace.data, "validation", ["general", "quality_2"])
    model = AutoModelForCausalLM.from_pretrained(workplace.hf).float().eval()
    noise = record_noise(77, torch.from_numpy(groups.record_ids.copy()), 3, 0)[:, [0, 2]]
    weights = []
    for index in range(len(groups)):
        group = groups[index]
        lengths = [n for d in range(2) for n in (len(group.chosen[d]), len(group.rejected[d]))]
        probs = [part.exp() for part in separate_logps(model, [group]).split(lengths)]
        draws = [
            p.mean() + (p.std() if len(p) > 1 else 0) * z for p, z in zip(probs, noise[index].flatten(), strict=True)
        ]
        weights.append(torch.softmax(torch.stack([draws[0] + draws[1], draws[2] + draws[3]]), 0))
    mean = torch.stack(weights).mean(0)
    assert [summary["weight/general"], summary["weight/quality_2"]] == pytest.approx(mean.tolist(), abs=1e-5)


def test_trained_weights_go_back_to_hugging_face(ranks, workplace, tmp_path):
    """Train on TP 2 × PP 2, export, load in transformers: its log-probabilities are those that Megatron dumped."""
    save, dump = tmp_path / "run", tmp_path / "logps.jsonl"
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    own = ["--save", str(save), "--train-iters", "3", "--amopo-dump-logps", str(dump)]
    ranks.run(train, 4, flags(workplace, *layout, *own), want_tensors=False)
    megatron_to_hf(save, tmp_path / "export")
    assert not any(row.differing for row in verify(tmp_path / "export", save))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").float().eval()
    groups = PreparedGroups.open(workplace.data, "validation")
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    group = groups[4]
    parts = separate_logps(model, [group]).split(
        [n for d in range(3) for n in (len(group.chosen[d]), len(group.rejected[d]))]
    )
    for d, line in enumerate(lines[12:15]):
        assert [line["chosen"], line["rejected"]] == pytest.approx(
            [parts[2 * d].sum().item(), parts[2 * d + 1].sum().item()], abs=1e-4
        )
