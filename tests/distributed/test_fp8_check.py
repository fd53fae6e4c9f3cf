"""The FP8 check under every layout, with other arithmetic in FP8's place: a final norm whose weight is negated."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_amopo.certification.observed_run import metrics
from megatron_amopo.data.batching import SampleOrder
from megatron_amopo.data.dataset import PreparedGroups
from tests.distributed.layout_runs import CP2, OVERLAP, PP2, SGD, SGD_BY_ADAM, TP2, VPP
from tests.distributed.test_model import separate_logps
from tests.support.jobs_observers import fp8_contexts, train_with_fp8_check

BATCH, SEED, FACTOR = 8, 7, -1.0


def flags(place, save, micro_batch_size, *extra):
    return [
        "--amopo-data", str(place.data), "--pretrained-checkpoint", str(place.mcore), "--tensorboard-dir", str(save),
        "--micro-batch-size", str(micro_batch_size), "--global-batch-size", str(BATCH), "--train-iters", "3",
        "--log-interval", "1", "--lr-decay-style", "constant", "--amopo-seed", str(SEED), *SGD, *extra,
    ]  # fmt: skip


CHECKED = ["--amopo-fp8-check-interval", "1"]


@pytest.fixture(scope="module")
def checked(ranks, workplace, tmp_path_factory):
    """One rank, a whole batch in a micro-batch."""
    save = tmp_path_factory.mktemp("checked")
    ranks.run(train_with_fp8_check, 1, [*flags(workplace, save, BATCH), *CHECKED], FACTOR)
    return save


def test_equals_transformers(checked, workplace):
    first = metrics(checked, "fp8")[0]
    groups = PreparedGroups.open(workplace.data)
    indices, _ = SampleOrder(len(groups), SEED)(range(BATCH))
    records = [groups[int(index)] for index in indices]
    lengths = [[[len(c), len(r)] for c, r in zip(each.chosen, each.rejected, strict=True)] for each in records]
    model = AutoModelForCausalLM.from_pretrained(workplace.hf).float().eval()
    plain = separate_logps(model, records)
    with torch.no_grad():
        model.model.norm.weight *= FACTOR
    other = separate_logps(model, records)

    def margins(logps):
        means = [part.mean() for part in logps.split(torch.tensor(lengths).flatten().tolist())]
        return -torch.stack(means).view(BATCH, -1, 2).diff(dim=-1)[..., 0]

    assert first["logp_difference"] == pytest.approx((plain - other).abs().mean().item(), rel=1e-4)
    assert first["logp_difference_max"] == pytest.approx((plain - other).abs().max().item(), rel=1e-4)
    moved = (margins(plain) - margins(other)).abs().mean(0)
    flipped = ((margins(plain) > 0) != (margins(other) > 0)).float().mean(0)
    for d, name in enumerate(groups.dimensions):
        assert first[f"margin_difference/{name}"] == pytest.approx(moved[d].item(), rel=1e-3)
        assert first[f"flipped/{name}"] == pytest.approx(flipped[d].item())
    assert flipped.sum() > 0, "the case shows nothing"


@pytest.mark.parametrize(
    ("num_ranks", "micro_batch_size", "layout"),
    [
        (2, BATCH, TP2),
        (2, BATCH, PP2),
        (2, BATCH, CP2),
        (2, BATCH // 2, [*SGD_BY_ADAM, "--use-distributed-optimizer", *OVERLAP]),
    ],
    ids=["tp2", "pp2", "cp2", "dp2-overlap"],
)
def test_layouts_agree(ranks, workplace, checked, tmp_path, num_ranks, micro_batch_size, layout):
    job = [*flags(workplace, tmp_path, micro_batch_size, *layout), *CHECKED]
    ranks.run(train_with_fp8_check, num_ranks, job, FACTOR)
    for mine, theirs in zip(metrics(tmp_path, "fp8"), metrics(checked, "fp8"), strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name


def test_an_interleaved_pipeline_takes_two_micro_batches(ranks, workplace, tmp_path):
    ranks.run(train_with_fp8_check, 2, [*flags(workplace, tmp_path, 1, *PP2, *VPP), *CHECKED], FACTOR)
    assert [line["iteration"] for line in metrics(tmp_path, "fp8")] == [1, 2, 3]
    assert all(line["logp_difference"] > 0 for line in metrics(tmp_path, "fp8"))


def test_training_is_the_same(ranks, workplace, checked, tmp_path):
    ranks.run(train_with_fp8_check, 1, flags(workplace, tmp_path, BATCH), FACTOR)
    assert metrics(tmp_path, "fp8") == []
    losses, unchecked = ([line["loss"] for line in metrics(folder)] for folder in (checked, tmp_path))
    assert losses == unchecked
    assert len(losses) == 3


def test_fp8_is_switched_off_and_on_again(ranks, workplace):
    """By what Megatron's block asks for each of the four layers."""
    assert ranks.run(fp8_contexts, 1, workplace.mcore)[0] == (4, 0, 4, "hybrid")
