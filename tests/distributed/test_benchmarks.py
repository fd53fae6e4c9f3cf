"""The benchmarks that need a model: they run, and both their steps compute the same loss and gradient."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import dimensions, methods, precision, step
from benchmarks.support import Samples
from tests.support.benchmark_files import make_benchmark_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_benchmark_files(tmp_path_factory.mktemp("benchmark_files"))


def run(ranks, benchmark, files, folder, *flags):
    """What a benchmark measured, on the first rank."""
    arguments = [*files.data_flags, *files.model_flags, "--short", "12", "--output", str(folder), *flags]
    assert ranks.run(benchmark.main, 1, arguments) == [0]
    return json.loads((folder / "results.json").read_text())


def same_results(comparison):
    ours, released = comparison["ours"], comparison["released"]
    for what in ("loss", "gradient_norm"):
        assert ours[what] == pytest.approx(released[what], rel=1e-5), what


def test_step(ranks, files, tmp_path):
    cases = run(ranks, step, files, tmp_path / "out", "--records", "2", "--long-records", "2", "--peak-tflops", "1")[
        "cases"
    ]
    assert len(cases) == 3
    for case in cases.values():
        same_results(case)
        shares = case["shares_of_our_time"]
        assert sum(shares["categories"].values()) == pytest.approx(1)
        assert all(share > 0 for kind in shares.values() for share in kind.values())
        assert sum(shares["rest"].values()) < shares["categories"]["rest"]
    one, two = (case for name, case in cases.items() if "≤" in name)
    assert one["ours"]["loss"] == pytest.approx(two["ours"]["loss"], rel=1e-5)
    assert one["flop_ratio"] < two["flop_ratio"]  # padded together
    assert (tmp_path / "out/step.png").stat().st_size > 0
    assert "ours, of the peak" in (tmp_path / "out/README.md").read_text()


def test_dimensions(ranks, files, tmp_path):
    counts = run(ranks, dimensions, files, tmp_path / "out", "--records", "1")["by_number_of_dimensions"]
    assert list(counts) == [str(d) for d in range(1, 9)]
    for comparison in counts.values():
        same_results(comparison)
    tokens = [comparison["padded_tokens"] for comparison in counts.values()]
    assert tokens == sorted(tokens)


def test_methods(ranks, files, tmp_path):
    found = run(ranks, methods, files, tmp_path / "out", "--records", "1")["methods"]
    assert len(found) == 6
    for result in found.values():
        assert (result["pass_seconds"] is not None) == (result["reference"] == methods.CACHED)
    assert {(result["dimensions"], result["reference"]) for result in found.values()} == {
        (count, reference)
        for count in (1, max(result["dimensions"] for result in found.values()))
        for reference in (methods.NONE, methods.CACHED, methods.SECOND)
    }


def test_what_is_paid_once_is_shared_by_the_epochs():
    result = methods.Result(4, methods.CACHED, Samples((3.0, 5.0)), Samples((1.2, 0.6)), 0)
    assert result.per_epoch(3).values == pytest.approx((3.4, 5.2))
    assert replace(result, pass_seconds=None).per_epoch(3).values == (3.0, 5.0)


def test_steps_that_differ_are_not_compared(ranks, files):
    assert "loss: ours" in ranks.run(difference, 1, files)[0]


def difference(files):
    """What a comparison says when one model's weights have moved."""
    from benchmarks.comparison import Contest, ResultsDiffer
    from benchmarks.models import ModelSlice, both_models
    from megatron_amopo.certification.tiny import random_groups

    model_slice = ModelSlice.of(files.config, 2)
    with both_models(model_slice) as models:
        contest = Contest(models, model_slice, random_groups(2, dimensions=2), ("general", "a"), 1)
        contest.check(torch.float32)
        with torch.no_grad():
            models.transformers.model.norm.weight.mul_(1.5)
        try:
            contest.check(torch.float32)
        except ResultsDiffer as found:
            return str(found)
    return ""


def test_precision(ranks, files, tmp_path):
    flags = [*files.data_flags, "--config", str(files.config), "--records", "2", "--repetitions", "1"]
    assert ranks.run(precision.main, 1, [*flags, "--peak-tflops", "1", "--output", str(tmp_path)]) == [0]
    found = json.loads((tmp_path / "results.json").read_text())["shapes"]["config"]
    assert list(found) == ["float32", "bf16"]
    assert 0 < found["float32"]["logp_difference"] < 0.1
    assert found["float32"]["flops"] == found["bf16"]["flops"]
    for result in found.values():
        assert sum(result["shares"]["categories"].values()) == pytest.approx(1)
        assert result["shares"]["categories"]["linear layers"] > 0
        assert all(rate > 0 for rate in result["matmul_flops_per_second"]["values"])
    page = (tmp_path / "README.md").read_text()
    assert "of the bf16 peak" in page
    assert f"Left out, as this machine doesn't compute them: {', '.join(precision.FP8)}." in page


def test_shapes_are_of_four_layers_that_every_recipe_takes():
    """Qwen2.5's published sizes; of its layers four, and as large a part of its 152,064 vocabulary rows."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    expected = {
        "7B": (3584, 18_944, 28, 4, 21_723),
        "14B": (5120, 13_824, 40, 8, 12_672),
        "32B": (5120, 27_648, 40, 8, 9504),
    }
    assert {name: tuple(map(shape.config.get, names)) for name, shape in precision.SHAPES.items()} == expected
    assert {name: shape.parts for name, shape in precision.SHAPES.items()} == {"7B": 7, "14B": 12, "32B": 16}
    for shape in precision.SHAPES.values():
        assert shape.config["num_hidden_layers"] == 4
        assert not shape.config["tie_word_embeddings"]
        hidden, intermediate, heads, key_values, _ = map(shape.config.get, names)
        query_key_value = hidden // heads * (heads + 2 * key_values)
        assert all(size % precision.PADDED_TO == 0 for size in (hidden, intermediate, query_key_value))


def test_packed_flops_are_those_that_torch_counts(ranks, files):
    counted, in_place, expected = ranks.run(count_flops, 1, files)[0]
    assert counted == expected.layers + expected.head
    assert in_place == expected.head / 2  # the head's gradients, which add up in memory


def count_flops(files):
    """Operations of our step's matrix products, those of them that add in place, and what the formula says."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.flops import packed_flops
    from benchmarks.models import ModelSlice, OurStep, both_models
    from megatron_amopo.certification.tiny import random_groups
    from megatron_amopo.data.batching import pack

    model_slice = ModelSlice.of(files.config, 2)
    batch = pack(random_groups(2, dimensions=2, seed=5), torch.zeros(2, 2, 2), [True] * 2)
    in_place = torch.ops.aten.addmm_  # which torch doesn't count by itself

    def product_flops(total, left, right, **_):  # of the shapes
        return 2 * left[0] * left[1] * right[1]

    with both_models(model_slice) as models:
        step = OurStep(models, ("general", "a"))
        with FlopCounterMode(display=False, custom_mapping={in_place: product_flops}) as counter:
            step(batch).backward()
    # Attention's products don't count here: torch counts the pairs that the mask hides, too.
    found = {op: n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    return sum(found.values()), found.get(in_place, 0), packed_flops(model_slice, [batch])
