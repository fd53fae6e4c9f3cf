"""One result under every layout: first gradients, losses of five steps and weights after them equal one rank's, in
float32.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_amopo.certification.observed_run import metrics, train
from megatron_amopo.certification.tiny import make_data

TOLERANCE = 1e-5
STEPS = 5
SGD = ["--optimizer", "sgd", "--sgd-momentum", "0", "--lr", "0.05"]
ADAM = ["--optimizer", "adam", "--lr", "1e-3"]
# The distributed optimizer knows no SGD. Adam without momentum and with an epsilon far above any gradient is SGD of
# rate lr / eps.
SGD_BY_ADAM = ["--optimizer", "adam", "--adam-beta1", "0", "--adam-eps", "1e3", "--lr", "50"]

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
FULL_RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
LAYOUTS = {
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "tp2-pp2": (4, TP2 + PP2),
    "tp2-sp": (2, [*TP2, "--sequence-parallel"]),
    "dp2": (2, []),
    "dp2-distopt": (2, ["--use-distributed-optimizer"]),
    "dp2-distopt-overlap": (2, ["--use-distributed-optimizer", "--overlap-grad-reduce"]),
    "tp2-dp2": (4, TP2),
    "pp2-vpp2": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "micro-batch-4": (1, ["--micro-batch-size", "4"]),
    "recompute": (1, FULL_RECOMPUTE),
    "cp2": (2, CP2),
    "cp4": (4, ["--context-parallel-size", "4"]),  # two key-value heads for four ranks
    "tp2-cp2": (4, TP2 + CP2),
    "tp2-sp-cp2": (4, [*TP2, "--sequence-parallel", *CP2]),
    "cp2-pp2": (4, CP2 + PP2),
    "cp2-pp2-vpp2-selective": (
        4,
        [*CP2, *PP2, "--num-layers-per-virtual-pipeline-stage", "1", "--recompute-granularity", "selective"],
    ),
    "cp2-dp2": (4, CP2),
    "cp2-recompute": (2, CP2 + FULL_RECOMPUTE),
    "cp2-distopt": (2, [*CP2, "--use-distributed-optimizer"]),
}


def flags(place, save: Path, *extra: str, tied: bool = True) -> list[str]:
    return [
        "--amopo-data", str(place.data),
        "--pretrained-checkpoint", str(place.mcore if tied else place.mcore_untied),
        "--tensorboard-dir", str(save),
        "--micro-batch-size", "1", "--global-batch-size", "8", "--train-iters", str(STEPS), "--log-interval", "1",
        "--lr-decay-style", "constant", "--weight-decay", "0", "--clip-grad", "0.5",
        "--amopo-eval-at-start", "--amopo-ftx-gamma", "0.1",
        *extra,
    ]  # fmt: skip


def relative_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all tensors over the norm of the expected ones; a padded vocabulary counts as far as it
    is filled.
    """
    assert actual.keys() == expected.keys()
    difference = total = 0.0
    for name, reference in expected.items():
        tensor = actual[name]
        if tensor.shape != reference.shape:
            rows = min(tensor.shape[0], reference.shape[0])
            assert tensor.shape[1:] == reference.shape[1:]
            tensor, reference = tensor[:rows], reference[:rows]
        difference += (tensor.double() - reference.double()).square().sum().item()
        total += reference.double().square().sum().item()
    return (difference / total) ** 0.5


@pytest.fixture(scope="module")
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


def check(run, save, reference, reference_save, besides=frozenset()):
    for kind in ("gradients", "weights"):
        actual, expected = getattr(run, kind), getattr(reference, kind)
        assert not any(tensor.isnan().any() for tensor in actual.values())
        error = relative_error(actual, expected)
        print(f"{kind}: relative error {error:.1e}")
        assert error <= TOLERANCE, kind
    # Against the distance that the weights have moved, as far as float32 resolves it beside the weights themselves.
    moved, expected = ({k: r.weights[k] - r.initial[k] for k in r.weights} for r in (run, reference))
    assert relative_error(moved, expected) <= 1e-3
    check_metrics(save, reference_save, besides)


def check_metrics(save, reference_save, besides):
    of_the_layout = {"records_per_s", "tokens_per_s", "imbalance", *besides}
    for split, count in (("train", STEPS), ("validation", 2)):
        actual, expected = metrics(save, split), metrics(reference_save, split)
        assert len(actual) == len(expected) == count
        for step, reference_step in zip(actual, expected, strict=True):
            for name in reference_step.keys() - of_the_layout:
                assert step[name] == pytest.approx(reference_step[name], rel=TOLERANCE, abs=1e-6), (split, name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name, ranks, workplace, one_rank, tmp_path):
    num_ranks, layout = LAYOUTS[name]
    optimizer = SGD_BY_ADAM if "--use-distributed-optimizer" in layout else SGD
    reference, reference_save = one_rank(tied=True, optimizer=optimizer)
    run = ranks.run(train, num_ranks, flags(workplace, tmp_path, *optimizer, *layout))[0]
    check(run, tmp_path, reference, reference_save)


@pytest.mark.parametrize("name", ["tp2-pp2", "tp2-sp"])
def test_untied_embeddings(name, ranks, workplace, one_rank, tmp_path):
    num_ranks, layout = LAYOUTS[name]
    reference, reference_save = one_rank(tied=False, optimizer=SGD)
    run = ranks.run(train, num_ranks, flags(workplace, tmp_path, *SGD, *layout, tied=False))[0]
    assert "output_layer.weight" in run.weights
    check(run, tmp_path, reference, reference_save)


@pytest.fixture(scope="module")
def unshared(ranks, workplace, tmp_path_factory):
    """One rank's run on records whose prompts begin with a question, each sequence packed by itself."""
    place = replace(workplace, data=tmp_path_factory.mktemp("questions") / "data")
    make_data(place.data, shared_question=True)
    save = tmp_path_factory.mktemp("unshared")
    return place, ranks.run(train, 1, flags(place, save, *SGD, "--amopo-share-prefixes", "none"))[0], save


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (1, ["--amopo-share-prefixes", "responses"]),
        (1, []),
        (2, [*PP2, *LAYOUTS["recompute"][1]]),
        (2, ["--micro-batch-size", "2"]),
    ],
    ids=["shared-prompts", "shared-questions", "shared-questions-pp2-recompute", "shared-questions-dp2"],
)
def test_sharing_prefixes_changes_no_result(num_ranks, layout, ranks, unshared, tmp_path):
    place, reference, reference_save = unshared
    run = ranks.run(train, num_ranks, flags(place, tmp_path, *SGD, *layout))[0]
    check(run, tmp_path, reference, reference_save, besides={"tokens_per_record"})
    fewer, tokens = (metrics(save)[0]["tokens_per_record"] for save in (tmp_path, reference_save))
    assert fewer < tokens


@pytest.mark.parametrize(("budget", "count", "size_said"), [(500, 2, 2), (170, 4, 1)])
def test_a_budget_of_tokens_changes_no_result(ranks, workplace, one_rank, tmp_path, budget, count, size_said):
    """Two records a micro-batch stay within 500 tokens in every step of two ranks, four don't; of 170 tokens one record
    has more by itself. It is said.
    """
    reference, reference_save = one_rank(tied=True, optimizer=SGD)
    options = flags(workplace, tmp_path, *SGD, "--amopo-max-tokens-per-micro-batch", str(budget))
    size = options.index("--micro-batch-size")
    run = ranks.run(train, 2, options[:size] + options[size + 2 :])[0]
    check(run, tmp_path, reference, reference_save)
    assert f"{count} micro-batch(es) per rank and step, of {size_said} record(s) on average, the" in run.printed
    assert ("1 record(s) exceed --amopo-max-tokens-per-micro-batch 170 alone" in run.printed) == (budget == 170)
    assert "over an epoch the fullest of 2 data-parallel rank(s) has 1.0" in run.printed
    assert all(1 <= step["imbalance"] < 1.1 for step in metrics(tmp_path))


@pytest.mark.parametrize("name", ["tp2-pp2", "dp2-distopt"])
def test_losses_with_adam(name, ranks, workplace, one_rank, tmp_path):
    num_ranks, layout = LAYOUTS[name]
    _, reference_save = one_rank(tied=True, optimizer=ADAM)
    ranks.run(train, num_ranks, flags(workplace, tmp_path, *ADAM, *layout))
    for step, reference in zip(metrics(tmp_path), metrics(reference_save), strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], rel=TOLERANCE)
