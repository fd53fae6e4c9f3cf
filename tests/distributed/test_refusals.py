"""Every refusal at start, one by one: exit code 2's message names the flag, the file or the record."""

import json
import shutil
import time

import pytest

from megatron_amopo.certification.tiny import make_data
from megatron_amopo.training.supported_flags import FOREIGN_GROUPS, MODEL_GROUPS, SUPPORTED_MODEL_FLAGS, UNSUPPORTED
from tests.support.jobs import parser_flags, refusal, said_under_torchrun

BASE = ["--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "2", "--lr", "1e-3"]
PP2_VPP2 = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]

FLAGS = {
    "context ring": (["--context-parallel-size", "2", "--cp-comm-type", "p2p"], 2, "--cp-comm-type is not supported"),
    "context hierarchy": (
        ["--context-parallel-size", "2", "--hierarchical-context-parallel-sizes", "2", "1"],
        2,
        "--hierarchical-context-parallel-sizes is not supported",
    ),
    "uneven context": (
        ["--context-parallel-size", "2", "--hybrid-context-parallel"],
        2,
        "--hybrid-context-parallel is not supported",
    ),
    "attention": (["--amopo-attention", "varlen", "--bf16"], 1, "--amopo-attention varlen needs CUDA and --bf16"),
    "no context": (["--context-parallel-size", "0"], 1, "--context-parallel-size is 0"),
    "more ranks than context": (
        ["--context-parallel-size", "2"],
        3,
        "3 rank(s) were started, which is not a multiple of --tensor-model-parallel-size 1 × "
        "--pipeline-model-parallel-size 1 × --context-parallel-size 2 = 2",
    ),
    "heads over context": (
        ["--context-parallel-size", "3"],
        3,
        "--context-parallel-size 3 doesn't divide the model's 4 attention heads",
    ),
    "heads over tensor and context": (
        ["--tensor-model-parallel-size", "2", "--context-parallel-size", "4"],
        8,
        "--context-parallel-size 4 doesn't divide the model's 2 attention heads per tensor-parallel rank (4 / 2)",
    ),
    "fp8": (["--fp8-format", "hybrid", "--bf16"], 1, "--fp8-format needs Transformer Engine's layers"),
    "fp8 machine": (
        ["--fp8-format", "hybrid", "--bf16", "--transformer-impl", "transformer_engine"],
        1,
        "--transformer-impl transformer_engine needs Transformer Engine, which isn't installed",
    ),
    "optimizer": (
        ["--bf16", "--use-distributed-optimizer", "--use-precision-aware-optimizer"],
        1,
        "--use-precision-aware-optimizer needs Transformer Engine, which isn't installed",
    ),
    "offload": (["--bf16", "--optimizer-cpu-offload"], 1, "--optimizer-cpu-offload takes the optimizer from the GPU"),
    "fp8 output": (["--fp8-output-proj"], 1, "--fp8-output-proj is not supported"),
    "fp8 weights": (["--fp8-param-gather"], 1, "--fp8-param-gather is not supported"),
    "fp8 check": (["--amopo-fp8-check-interval", "1"], 1, "--amopo-fp8-check-interval is about FP8"),
    "fp16": (["--fp16"], 1, "--fp16 is not supported: use --bf16"),
    "dropout": (["--hidden-dropout", "0.1"], 1, "--hidden-dropout is not supported"),
    "attention dropout": (["--attention-dropout", "0.1"], 1, "--attention-dropout is not supported"),
    "param gather": (
        ["--overlap-param-gather-with-optimizer-step"],
        1,
        "--overlap-param-gather-with-optimizer-step is not supported: it has not been tried",
    ),
    "FSDP": (["--use-megatron-fsdp"], 1, "--use-megatron-fsdp is not supported: the fused head takes"),
    "eval iters": (["--eval-iters", "3"], 1, "--eval-iters is not supported"),
    "ramp-up": (["--step-batch-size-schedule", "0:8 100:16"], 1, "--step-batch-size-schedule is not supported"),
    "skipping": (["--iterations-to-skip", "3"], 1, "--iterations-to-skip is not supported"),
    "model flag": (["--glu-linear-offset", "1.0"], 1, "--glu-linear-offset is not supported: what the model computes"),
    "rope": (["--no-rope-freq", "2"], 1, "--no-rope-freq is not supported"),
    "alias": (["--enable-cuda-graph"], 1, "--enable-cuda-graph is not supported"),
    "deferred": (["--defer-embedding-wgrad-compute"], 1, "--defer-embedding-wgrad-compute is not supported"),
    "foreign": (["--mock-data"], 1, "--mock-data is not supported: it belongs to another kind of training"),
    "checkpoint format": (["--ckpt-format", "torch"], 1, "--ckpt-format is not supported"),
    "no tokens": (["--amopo-max-tokens-per-micro-batch", "0"], 1, "--amopo-max-tokens-per-micro-batch is 0"),
    "two sizes": (
        ["--amopo-max-tokens-per-micro-batch", "900"],
        1,
        "--micro-batch-size and --amopo-max-tokens-per-micro-batch both say how large a micro-batch is",
    ),
    "no micro-batch": (["--micro-batch-size", "0"], 1, "--micro-batch-size is 0"),
    "no ranks": (["--tensor-model-parallel-size", "0"], 1, "--tensor-model-parallel-size is 0"),
    "yaml": (["--yaml-cfg", "run.yaml"], 1, "--yaml-cfg is not supported: give flags"),
    "misspelt": (["--amopo-betta", "0.1"], 1, "unrecognized arguments: --amopo-betta 0.1; did you mean --amopo-beta?"),
    "misspelt with =": (["--micro-batchsize=1"], 1, "--micro-batchsize=1; did you mean --micro-batch-size?"),
    "unknown": (["--zzzz"], 1, "unrecognized arguments: --zzzz (--help lists the flags)"),
    "no float": (["--lr", "much"], 1, "argument --lr: invalid float value: 'much'"),
    "negative seed": (["--amopo-seed", "-5"], 1, "--amopo-seed is -5"),
    "not a number": (["--amopo-gamma", "nan"], 1, "--amopo-gamma is nan"),
    "shape": (["--num-layers", "7"], 1, "--num-layers 7 contradicts"),
    "exit signal": (["--exit-signal-handler-for-training"], 1, "--exit-signal-handler-for-training is not supported"),
    "local checkpoints": (["--non-persistent-ckpt-type", "global"], 1, "--non-persistent-ckpt-type is not supported"),
    "checkpoints of nothing": (["--amopo-keep-checkpoints", "2"], 1, "--amopo-keep-checkpoints is of the checkpoints"),
    "no checkpoints": (["--amopo-keep-checkpoints", "0"], 1, "--amopo-keep-checkpoints is 0; expected 1 or more"),
    "spike": (["--amopo-loss-spike", "0.5"], 1, "--amopo-loss-spike is 0.5; expected more than 1"),
    "rerun": (["--rerun-mode", "report_stats"], 1, "--rerun-mode is not supported: a step that runs twice would be"),
    "conflict of no step": (
        ["--amopo-conflict-interval", "3"],
        1,
        "--amopo-conflict-interval 3 is more than the run's 2 steps",
    ),
    "two lengths": (["--amopo-epochs", "1"], 1, "--amopo-epochs and --train-iters both say"),
    "gamma of orpo": (["--amopo-pairwise", "orpo", "--amopo-gamma", "1"], 1, "pairwise loss 'orpo' has no gamma"),
    "beta": (["--amopo-beta", "0"], 1, "--amopo-beta is 0.0"),
    "ftx": (["--amopo-ftx-gamma", "-1"], 1, "--amopo-ftx-gamma is -1.0"),
    "reference unread": (
        ["--amopo-reference-cache", "x"],
        1,
        "--amopo-reference-cache: --amopo-pairwise simpo reads no reference log-probabilities",
    ),
    "not a reference": (
        ["--amopo-pairwise", "dpo", "--amopo-reference-cache", "."],
        1,
        "--amopo-reference-cache . holds something else than reference log-probabilities",
    ),
    "smoothing of simpo": (["--amopo-label-smoothing", "0.1"], 1, "leave out --amopo-label-smoothing"),
    "names of weights": (
        ["--amopo-weighting", "fixed", "--amopo-weights", "general=1,beauty=1"],
        1,
        "--amopo-weights names 'beauty', which is none of the trained dimensions: general, quality_1, quality_2",
    ),
    "names of objectives": (
        ["--amopo-pairwise", "modpo", "--amopo-modpo-weights", "general=1", "--amopo-modpo-objective", "general"],
        1,
        "--amopo-modpo-weights names 'general', which is none of the scored dimensions: quality_1, quality_2",
    ),
    "no rewards": (
        ["--amopo-pairwise", "modpo", "--amopo-modpo-margins", "rewards", "--amopo-modpo-weights", "quality_1=1",
         "--amopo-modpo-objective", "quality_1"],
        1,
        "--amopo-modpo-margins rewards: the data was prepared without rewards",
    ),
    "margins of nothing": (["--amopo-modpo-margins", "rewards"], 1, "leave out --amopo-modpo-margins"),
    "names of floors": (
        ["--amopo-margin-floor", "beauty=1"],
        1,
        "--amopo-margin-floor names 'beauty', which is none of the trained dimensions: general, quality_1, quality_2",
    ),
    "floor is no number": (["--amopo-margin-floor", "general=nan"], 1, "--amopo-margin-floor general is nan"),
    "rate of no floors": (["--amopo-margin-floor-lr", "0.1"], 1, "--amopo-margin-floor-lr is of --amopo-margin-floor"),
    "floor of one dimension": (
        ["--amopo-dimensions", "quality_2", "--amopo-weight-floor", "0.1"],
        1,
        "--amopo-weight-floor: a single dimension has weight 1",
    ),
    "head": (["--amopo-head-buffer-mib", "0"], 1, "--amopo-head-buffer-mib is 0"),
    "dimension": (["--amopo-dimensions", "general,beauty"], 1, "no dimension 'beauty'"),
    "more ranks than layout": (
        ["--tensor-model-parallel-size", "2"],
        3,
        "3 rank(s) were started, which is not a multiple of --tensor-model-parallel-size 2",
    ),
    "heads": (
        ["--tensor-model-parallel-size", "4"],
        4,
        "--tensor-model-parallel-size 4 doesn't divide the model's 2 key-value heads",
    ),
    "layers": (
        ["--pipeline-model-parallel-size", "8"],
        8,
        "--pipeline-model-parallel-size 8 is more than the model's 4 layers",
    ),
    "batch": (["--global-batch-size", "6"], 4, "--global-batch-size 6 is not a multiple of --micro-batch-size 1 × 4"),
    "eval batch": (["--eval-global-batch-size", "3"], 2, "--eval-global-batch-size 3 is not a multiple"),
    "interleaved": (
        [*PP2_VPP2],
        8,
        "--global-batch-size 4 makes 1 micro-batch(es) of 1 on 4 data-parallel rank(s); interleaved pipeline stages "
        "take them in groups of 2, the last of 2 or more",
    ),
    "interleaved, by hand": (
        ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Et|t|t|tL"],
        8,
        "--global-batch-size 4 makes 1 micro-batch(es) of 1 on 4 data-parallel rank(s); interleaved pipeline stages",
    ),
    "stages of unknown letters": (
        ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Ex|t|t|tL"],
        2,
        "--pipeline-model-parallel-layout Ex|t|t|tL: Invalid layer character: x",
    ),
    "interleaved, evaluation": (
        [*PP2_VPP2, "--eval-micro-batch-size", "4"],
        2,
        "--eval-global-batch-size 4 makes 1 micro-batch(es) of 4 on 1 data-parallel rank(s)",
    ),
    "interleaved, group": (
        [*PP2_VPP2, "--microbatch-group-size-per-virtual-pipeline-stage", "1"],
        2,
        "--microbatch-group-size-per-virtual-pipeline-stage 1 is less than --pipeline-model-parallel-size 2",
    ),
    "interleaved, remainder": (
        [*PP2_VPP2, "--microbatch-group-size-per-virtual-pipeline-stage", "3"],
        2,
        "--global-batch-size 4 makes 4 micro-batch(es) of 1 on 1 data-parallel rank(s)",
    ),
    "Megatron's own": (
        ["--sequence-parallel", "--num-layers-per-virtual-pipeline-stage", "2"],
        1,
        "Megatron refuses these flags",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, ranks, workplace):
    extra, world_size, message = FLAGS[name]
    flags = ["--amopo-data", str(workplace.data), "--pretrained-checkpoint", str(workplace.mcore), *BASE, *extra]
    assert message in ranks.run(refusal, 1, flags, world_size=world_size)[0]


def test_nothing_else_is_refused(ranks, workplace):
    flags = ["--amopo-data", str(workplace.data), "--pretrained-checkpoint", str(workplace.mcore), *BASE]
    assert ranks.run(refusal, 1, flags)[0] == ""


def test_missing_pieces(ranks, workplace, tmp_path):
    data, model = ["--amopo-data", str(workplace.data)], ["--pretrained-checkpoint", str(workplace.mcore)]
    for flags, message in [
        ([*model, *BASE], "--amopo-data is missing"),
        ([*data, *BASE], "nothing to start from"),
        ([*data, *model, *BASE[2:]], "--micro-batch-size is missing"),
        (
            [*data, *model, *BASE[4:], "--amopo-max-tokens-per-micro-batch", "900"],
            "--global-batch-size is missing: --amopo-max-tokens-per-micro-batch splits it",
        ),
        ([*data, *model, *BASE[:4], "--lr", "1"], "nothing says how long to train"),
        ([*data, *model, *BASE[:6]], "--lr is missing"),
        ([*data, *model, *BASE[:4], "--lr", "1", "--amopo-epochs", "0"], "--amopo-epochs is 0"),
        (
            [*data, "--pretrained-checkpoint", str(tmp_path), *BASE],
            f"--pretrained-checkpoint {tmp_path} holds no checkpoint",
        ),
        ([*data, "--pretrained-checkpoint", str(workplace.hf), *BASE], "Give it as --amopo-hf-model instead"),
        (  # no batch size is given, which then is one micro-batch on a rank
            [*data, *model, *BASE[:2], *BASE[4:], *PP2_VPP2],
            "--global-batch-size 1 makes 1 micro-batch(es) of 1 on 1 data-parallel rank(s)",
        ),
        ([*model, "--amopo-data", str(tmp_path / "none"), *BASE], f"no prepared data at {tmp_path / 'none'}"),
        ([*model, "--amopo-data", str(tmp_path), *BASE], "manifest.json"),
    ]:
        world_size = 2 if PP2_VPP2[0] in flags else 1
        assert message in ranks.run(refusal, 1, flags, world_size=world_size)[0]


def test_hugging_face_folders_at_both_ends(ranks, workplace, tmp_path):
    """Refused before anything is imported or trained; tests/training/test_hugging_face.py has the other cases."""
    data, cache = ["--amopo-data", str(workplace.data)], ["--amopo-hf-cache", str(tmp_path / "cache")]
    start, save = ["--amopo-hf-model", str(workplace.hf)], ["--save", str(tmp_path / "run")]
    export = ["--amopo-export-hf", str(tmp_path / "aligned")]
    for flags, message in [
        (
            [*start, "--pretrained-checkpoint", str(workplace.mcore)],
            "--amopo-hf-model and --pretrained-checkpoint both",
        ),
        ([*start, "--num-layers", "7"], f"--num-layers 7 contradicts {workplace.hf / 'config.json'}"),
        ([*start, *export], "--amopo-export-hf needs --save"),
        ([*start, *save, *export, "--tensorboard-dir", export[1]], "--amopo-export-hf"),
        ([*start, *save, *export, "--skip-train"], "--amopo-export-hf with --skip-train"),
        ([*start, *save, *export], ""),
    ]:
        said = ranks.run(refusal, 1, [*data, *cache, *flags, *BASE])[0]
        assert said.startswith(message) if message else said == ""
        (tmp_path / "aligned").rmdir() if (tmp_path / "aligned").exists() else None
    assert not (tmp_path / "cache").exists()


def test_what_needs_a_validation_part(ranks, workplace, tmp_path):
    make_data(tmp_path / "data", train=8, validation=0)
    base = ["--amopo-data", str(tmp_path / "data"), "--pretrained-checkpoint", str(workplace.mcore), *BASE]
    for extra, message in [
        (["--amopo-dump-logps", str(tmp_path / "logps.jsonl")], "--amopo-dump-logps is written at evaluation, and"),
        (["--amopo-leakage"], "--amopo-leakage is measured at evaluation, and the data has no validation part"),
    ]:
        assert ranks.run(refusal, 1, [*base, *extra])[0].startswith(message)
    # With it, too few micro-batches for the interleaved stages: the case "interleaved, evaluation" above.
    assert ranks.run(refusal, 1, [*base, *PP2_VPP2, "--eval-micro-batch-size", "4"], world_size=2)[0] == ""


def test_half_a_checkpoint(ranks, workplace, tmp_path):
    """A folder with a shape but without weights must not train from random ones."""
    half = tmp_path / "half"
    shutil.copytree(workplace.mcore / "hf", half / "hf")
    flags = ["--amopo-data", str(workplace.data), "--pretrained-checkpoint", str(half), *BASE]
    assert f"--pretrained-checkpoint {half} holds no checkpoint" in ranks.run(refusal, 1, flags)[0]

    shapeless = tmp_path / "shapeless"
    shutil.copytree(workplace.mcore, shapeless, ignore=shutil.ignore_patterns("hf"))
    flags = ["--amopo-data", str(workplace.data), "--load", str(shapeless), *BASE]
    assert f"--load {shapeless} holds no hf/config.json" in ranks.run(refusal, 1, flags)[0]


def test_unwritable_outputs(ranks, workplace, tmp_path):
    (tmp_path / "file").write_text("")
    base = ["--amopo-data", str(workplace.data), "--pretrained-checkpoint", str(workplace.mcore), *BASE]
    for flag, value in (("--save", tmp_path / "file"), ("--amopo-dump-logps", tmp_path / "file" / "logps.jsonl")):
        assert f"{flag} {tmp_path / 'file'}: can't be made" in ranks.run(refusal, 1, [*base, flag, str(value)])[0]
    # A folder in which nobody can make files, whatever their permissions.
    assert ranks.run(refusal, 1, [*base, "--save", "/proc/self"])[0].startswith(
        "--save /proc/self: can't be written to"
    )


def test_a_folder_of_another_run(ranks, workplace, tmp_path):
    """Another model's run would leave its config beside these weights."""
    other = tmp_path / "other"
    shutil.copytree(workplace.mcore_untied, other)
    base = [
        "--amopo-data",
        str(workplace.data),
        "--pretrained-checkpoint",
        str(workplace.mcore),
        *BASE,
        "--save",
        str(other),
    ]
    assert f"--save {other} holds a run already" in ranks.run(refusal, 1, base)[0]
    assert ranks.run(refusal, 1, [*base, "--load", str(other)])[0] == ""
    assert "holds a run already" in ranks.run(refusal, 1, [*base, "--load", str(other), "--finetune"])[0]
    assert ranks.run(refusal, 1, [*base, "--skip-train"])[0] == ""


def test_every_refused_flag_exists(ranks):
    """A flag that Megatron renames must not slip through."""
    known = ranks.run(parser_flags, 1)[0]
    groups = {group for _, group in known.values()}
    assert groups >= MODEL_GROUPS | FOREIGN_GROUPS
    assert known.keys() >= SUPPORTED_MODEL_FLAGS
    assert {unsupported.name for unsupported in UNSUPPORTED} <= known.keys()
    for unsupported in UNSUPPORTED:
        assert unsupported.flag == known[unsupported.name][0]


def test_truncated_shard(ranks, workplace, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(workplace.data, copy)
    shard = next((copy / "train").iterdir())
    shard.write_bytes(shard.read_bytes()[:-4000])
    flags = ["--amopo-data", str(copy), "--pretrained-checkpoint", str(workplace.mcore), *BASE]
    assert str(copy / "train") in ranks.run(refusal, 1, flags)[0]


def test_data_of_a_larger_vocabulary(ranks, workplace, tmp_path):
    make_data(tmp_path / "data", vocab_size=400)
    flags = ["--amopo-data", str(tmp_path / "data"), "--pretrained-checkpoint", str(workplace.mcore), *BASE]
    message = ranks.run(refusal, 1, flags)[0]
    assert "has token ids up to 399" in message
    assert "has 151 rows" in message


def test_sequences_longer_than_the_model_takes(ranks, workplace, tmp_path):
    make_data(tmp_path / "data", longest=600, shortest=500)
    flags = ["--amopo-data", str(tmp_path / "data"), "--pretrained-checkpoint", str(workplace.mcore), *BASE]
    message = ranks.run(refusal, 1, flags)[0]
    assert "the model takes 512" in message
    assert "memory:" in message  # the record's source


def test_wrong_tokenizer(ranks, workplace, tmp_path):
    """The checkpoint's own tokenizer against the one that the data was prepared with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    copy = tmp_path / "mcore"
    shutil.copytree(workplace.mcore, copy)
    words = {f"w{i}": i for i in range(100)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w2"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}w1{% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    tokenizer.save_pretrained(copy / "hf")
    flags = ["--amopo-data", str(workplace.data), "--pretrained-checkpoint", str(copy), *BASE]
    message = ranks.run(refusal, 1, flags)[0]
    assert "was prepared with another tokenizer" in message
    assert str(workplace.data) in message


def test_a_resumed_run_may_not_leave_a_flag_out(ranks, workplace, tmp_path):
    load = tmp_path / "run"
    shutil.copytree(workplace.mcore, load)
    from tests.support.jobs import run_record_of

    same = ["--amopo-data", str(workplace.data), "--load", str(load), *BASE]
    floored = [*same, "--amopo-weight-floor", "0.1"]
    (load / "run.json").write_text(json.dumps(ranks.run(run_record_of, 1, floored)[0]))
    assert ranks.run(refusal, 1, floored)[0] == ""
    assert "another --amopo-weight-floor (0.1, now None)" in ranks.run(refusal, 1, same)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--amopo-beta", "1.5"], "another --amopo-beta (0.8, now 1.5)"),
        (["--amopo-pairwise", "orpo"], "another --amopo-pairwise"),
        (["--amopo-dimensions", "general"], "another --amopo-dimensions"),
        (["--amopo-weight-temperature", "0.5"], "another --amopo-weight-temperature (None, now 0.5)"),
        (["--amopo-weight-floor", "general=0.1"], "another --amopo-weight-floor (None, now {'general': 0.1})"),
        (["--amopo-seed", "99"], "another --amopo-seed"),
        (["--global-batch-size", "8"], "another --global-batch-size (4, now 8)"),
        (["--amopo-epochs", "3"], "another --amopo-epochs (2, now 3)"),
        ("data", "another --amopo-data (other data)"),
    ],
)
def test_a_resumed_run_must_be_the_same_run(ranks, workplace, tmp_path, change, message):
    load = tmp_path / "run"
    shutil.copytree(workplace.mcore, load)
    from tests.support.jobs import run_record_of

    data = workplace.data
    epochs = [*BASE[:4], "--lr", "1e-3", "--amopo-epochs", "2"]
    same = ["--amopo-data", str(data), "--load", str(load), *epochs]
    (load / "run.json").write_text(json.dumps(ranks.run(run_record_of, 1, same)[0]))
    assert ranks.run(refusal, 1, same)[0] == ""
    if change == "data":
        make_data(tmp_path / "other", seed=8)
        changed = ["--amopo-data", str(tmp_path / "other"), "--load", str(load), *epochs]
    else:
        changed = [*same, *change]
    assert message in ranks.run(refusal, 1, changed)[0]
    assert ranks.run(refusal, 1, [*changed, "--finetune"])[0] == ""


@pytest.mark.parametrize("local_rank", [0, 1])
def test_under_torchrun_the_first_rank_speaks_first(local_rank, ranks):
    """Another would end it before it has; if the first finds no error, the other says its own."""
    start = time.monotonic()
    assert ranks.run(said_under_torchrun, 1, local_rank, 1.5)[0] == "error: --lr is missing\n"
    assert (time.monotonic() - start > 1.5) == (local_rank > 0)
