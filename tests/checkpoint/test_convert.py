"""What a conversion carries, converts and says; what it refuses; and that one which fails leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_amopo.checkpoint import hf_writer, output_folder, tensor_files
from megatron_amopo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_amopo.checkpoint.verify import verify
from megatron_amopo.data.model_card import CARD, CARD_MARK
from megatron_amopo.errors import CheckpointError
from tests.support.checkpoints import VOCABULARY, MakeFolder, all_files, edit_config, load_tensors, save_tiny_model
from tools import convert_checkpoint


def test_the_checkpoint_carries_tokenizer_and_template_but_no_code(make_folder: MakeFolder, tmp_path: Path) -> None:
    original = make_folder()
    (original / "modeling_own.py").write_text("print('run')")
    hf_to_megatron(original, tmp_path / "megatron")
    carried = {path.name for path in (tmp_path / "megatron" / "hf").iterdir()}
    assert carried == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "weights.json",
    }


@pytest.mark.parametrize(("spelling", "other"), [("dtype", "torch_dtype"), ("torch_dtype", "dtype")])
def test_dtype_converts_weights_and_config(make_folder: MakeFolder, tmp_path: Path, spelling: str, other: str) -> None:
    original = make_folder()
    edit_config(original, **{spelling: "float32", other: None})
    hf_to_megatron(original, tmp_path / "megatron")
    done = megatron_to_hf(tmp_path / "megatron", tmp_path / "half", dtype="bfloat16")
    assert done.dtypes == ("bfloat16",)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config[spelling] == "bfloat16"
    assert other not in config
    half, full = load_tensors(tmp_path / "half"), load_tensors(original)
    assert all(torch.equal(half[name], full[name].to(torch.bfloat16)) for name in full)
    rows = verify(tmp_path / "half", tmp_path / "megatron")
    assert {(row.hf_dtype, row.megatron_dtype, row.differing) for row in rows} == {("bfloat16", "float32", ())}


def retype(megatron: Path, dtype: torch.dtype) -> None:
    """Make the checkpoint one that training in another precision saved: its weights in `dtype`, `hf/` as it was."""
    other = megatron.with_name("retyped")
    megatron_to_hf(megatron, other, dtype=str(dtype).removeprefix("torch."))
    hf_to_megatron(other, megatron.with_name("retyped-megatron"))
    shutil.rmtree(megatron / "release")
    (megatron.with_name("retyped-megatron") / "release").rename(megatron / "release")


def test_original_types_and_files_come_back_after_training_in_another_precision(
    make_folder: MakeFolder, small_parts: None, tmp_path: Path
) -> None:
    original = make_folder(dtype=torch.bfloat16, max_shard_size="100KB")
    hf_to_megatron(original, tmp_path / "megatron")
    retype(tmp_path / "megatron", torch.float32)
    done = megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert (done.dtypes, done.notes) == (("bfloat16",), ())
    assert all_files(tmp_path / "back") == all_files(original)


def test_stored_types_on_demand_and_where_there_is_no_record(make_folder: MakeFolder, tmp_path: Path) -> None:
    """transformers loads in the type that config.json says, so it says what the weights are."""
    original, megatron = make_folder(dtype=torch.bfloat16, max_shard_size="100KB"), tmp_path / "megatron"
    hf_to_megatron(original, megatron)
    retype(megatron, torch.float32)
    done = megatron_to_hf(megatron, tmp_path / "stored", dtype="stored")
    assert done.dtypes == ("float32",)
    assert done.notes == ("config.json says float32 now, as the weights are (bfloat16 before)",)
    assert json.loads((tmp_path / "stored" / "config.json").read_text())["dtype"] == "float32"
    files = {path.name for path in original.glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "stored").glob("*.safetensors")} == files

    (megatron / "hf" / "weights.json").unlink()
    assert megatron_to_hf(megatron, tmp_path / "unrecorded").dtypes == ("float32",)
    assert [path.name for path in (tmp_path / "unrecorded").glob("*.safetensors")] == ["model.safetensors"]


def test_a_type_that_is_none(make_folder: MakeFolder, tmp_path: Path) -> None:
    """The tool's parser refuses it first; a program that calls the function has only this."""
    hf_to_megatron(make_folder(), tmp_path / "megatron")
    with pytest.raises(CheckpointError, match="--dtype int8: not one of original, stored, "):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="int8")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not a record of weights"),
        ('{"index_facts": [], "tensors": {"a": {"dtype": "int8", "file": "b"}}}', "not a record of weights"),
        ('{"index_facts": [], "tensors": {"a": {"dtype": "float32", "file": "../b"}}}', "is not the name of a file"),
        (
            '{"index_facts": [], "tensors": {"a": {"dtype": "float32", "file": "b"}}}',
            "tensor a is not part of the model",
        ),
        ('{"index_facts": [], "tensors": {}}', "tensor lm_head.weight is missing"),
    ],
)
def test_damaged_record(make_folder: MakeFolder, tmp_path: Path, content: str, message: str) -> None:
    hf_to_megatron(make_folder(), tmp_path / "megatron")
    (tmp_path / "megatron" / "hf" / "weights.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"hf/weights\.json: .*{message}"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_numbers_that_are_none_get_a_warning(
    make_folder: MakeFolder, small_parts: None, tmp_path: Path, bad: float
) -> None:
    """On either way, by name; the bytes pass through as they are."""
    original = make_folder()
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        tensor = load_tensors(original)[name]
        tensor[-1] = bad
        spoil(original, name, tensor)
    expected = ("NaN or infinite numbers in model.layers.1.self_attn.k_proj.weight, model.norm.weight",)
    assert hf_to_megatron(original, tmp_path / "megatron").warnings == expected
    assert megatron_to_hf(tmp_path / "megatron", tmp_path / "back").warnings == expected
    assert all_files(tmp_path / "back") == all_files(original)
    assert not any(row.differing for row in verify(original, tmp_path / "megatron"))


def test_numbers_too_large_for_the_type_get_a_warning(make_folder: MakeFolder, tmp_path: Path) -> None:
    original = make_folder()
    spoil(original, "model.norm.weight", torch.full((64,), 1e5))
    assert hf_to_megatron(original, tmp_path / "megatron").warnings == ()
    done = megatron_to_hf(tmp_path / "megatron", tmp_path / "half", dtype="float16")
    assert done.warnings == ("NaN or infinite numbers in model.norm.weight",)


def test_a_tied_copy_is_dropped_when_it_is_one(make_folder: MakeFolder, small_parts: None, tmp_path: Path) -> None:
    original = make_folder(tied=True)
    tensors = load_tensors(original)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight equals" in hf_to_megatron(original, tmp_path / "megatron").notes[0]
    tensors["lm_head.weight"][-1, 0] += 1
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        hf_to_megatron(original, tmp_path / "other")


def spoil(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace, add or (None) remove one tensor of a single-file folder."""
    tensors = load_tensors(folder)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (
            "model.layers.4.mlp.up_proj.weight",
            torch.ones(96, 64),
            "layers.4.mlp.up_proj.weight is not part of the model",
        ),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(8), "q_norm.weight is not part of the model"),
        ("model.norm.weight", torch.ones(65), r"model.norm.weight has shape \[65\], but by config.json it has \[64\]"),
        ("model.layers.3.self_attn.k_proj.bias", torch.ones(16).half(), "k_proj.bias is float16, but Megatron"),
    ],
)
def test_tensors_that_contradict_the_config(
    make_folder: MakeFolder, tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    original = make_folder()
    spoil(original, name, tensor)
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(original, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_config_that_contradicts_the_tensors(make_folder: MakeFolder, tmp_path: Path) -> None:
    original = make_folder()
    edit_config(original, vocab_size=VOCABULARY + 1)
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.weight has shape \[151, 64\], but by config.json it has \[152"
    ):
        hf_to_megatron(original, tmp_path / "megatron")


def test_unknown_architecture_names_the_folder(make_folder: MakeFolder, tmp_path: Path) -> None:
    original = make_folder()
    edit_config(original, architectures=["GPT2LMHeadModel"])
    with pytest.raises(CheckpointError, match=r"original/config\.json: architectures GPT2LMHeadModel: not supported"):
        hf_to_megatron(original, tmp_path / "megatron")


def test_existing_output_is_kept_unless_forced(make_folder: MakeFolder, tmp_path: Path) -> None:
    original, megatron, back = make_folder(), tmp_path / "megatron", tmp_path / "back"
    hf_to_megatron(original, megatron)
    with pytest.raises(CheckpointError, match="exists already; --force replaces it"):
        hf_to_megatron(original, megatron)
    hf_to_megatron(original, megatron, force=True)
    back.mkdir()
    megatron_to_hf(megatron, back)  # an empty folder is no output
    (back / "stale.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        megatron_to_hf(megatron, back)
    megatron_to_hf(megatron, back, force=True)
    assert all_files(back) == all_files(original)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron", "original"]


def test_force_replaces_only_what_looks_like_an_output(make_folder: MakeFolder, tmp_path: Path) -> None:
    original, precious = make_folder(), tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"has no latest_checkpointed_iteration\.txt: --force"):
        hf_to_megatron(original, precious, force=True)
    with pytest.raises(CheckpointError, match="can't be, hold or lie in the input"):
        hf_to_megatron(original, original / "megatron")
    with pytest.raises(CheckpointError, match="can't be, hold or lie in the input"):
        hf_to_megatron(original, tmp_path, force=True)
    # A training run has a tracker file, too; a working copy has a config.json.
    run, copy = tmp_path / "run", tmp_path / "copy"
    (run / "iter_0000500").mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text("500")
    with pytest.raises(CheckpointError, match="holds iter_0000500, which no conversion writes"):
        hf_to_megatron(original, run, force=True)
    megatron = tmp_path / "megatron"
    hf_to_megatron(original, megatron)
    copy.mkdir()
    (copy / "config.json").write_text("{}")
    (copy / "train.py").write_text("")
    with pytest.raises(CheckpointError, match=r"holds train\.py, which no conversion writes"):
        megatron_to_hf(megatron, copy, force=True)
    assert (precious / "thesis.tex").exists()


def test_force_replaces_an_export_with_our_card_and_no_other(make_folder: MakeFolder, tmp_path: Path) -> None:
    original, megatron, export = make_folder(), tmp_path / "megatron", tmp_path / "export"
    hf_to_megatron(original, megatron)
    megatron_to_hf(megatron, export)
    (export / CARD).write_text("# Mine\n")
    with pytest.raises(CheckpointError, match=r"holds README\.md, which no conversion writes"):
        megatron_to_hf(megatron, export, force=True)
    assert (export / CARD).read_text() == "# Mine\n"
    (export / CARD).write_text(f"---\n---\n{CARD_MARK}\n")
    megatron_to_hf(megatron, export, force=True)
    assert all_files(export) == all_files(original)  # the card was of the model of before


def test_a_failed_conversion_leaves_nothing(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, megatron = make_folder(), tmp_path / "megatron"
    hf_to_megatron(original, megatron)
    before = all_files(tmp_path)

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files.StoredTensor, "read", disk_full)
        with pytest.raises(CheckpointError, match=r"megatron: can't be written: .*No space left"):
            hf_to_megatron(original, megatron, force=True)
    monkeypatch.setattr(hf_writer.HfWriter, "write", disk_full)
    with pytest.raises(CheckpointError, match=r"back: can't be written: .*No space left"):
        megatron_to_hf(megatron, tmp_path / "back")
    assert all_files(tmp_path) == before


ROOT = Path(__file__).resolve().parents[2]
_LIMITED = """
import resource, sys
from tools import convert_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(convert_checkpoint.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_a_write_that_fails(make_folder: MakeFolder, tmp_path: Path, command: str) -> None:
    """As on a full disk: an error of the system in the middle of a data file. It is said, and nothing is left."""
    original, megatron = make_folder(), tmp_path / "megatron"
    hf_to_megatron(original, megatron)
    source = original if command == "hf-to-megatron" else megatron
    arguments = [command, str(source), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", _LIMITED, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"^error: \S+out: can't be written: .*File too large", done.stderr, re.MULTILINE), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "original"]


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """A folder of a user whom permissions bind, whom root becomes for the time of the test."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        if root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        yield Path(folder)
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_what_may_not_be_read(ordinary_user: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    original = save_tiny_model(ordinary_user / "original")
    (original / name).chmod(0)
    assert convert_checkpoint.main(["hf-to-megatron", str(original), str(ordinary_user / "megatron")]) == 2
    (original / name).chmod(0o700)
    assert f"error: {original / name}: " in capsys.readouterr().err
    assert not (ordinary_user / "megatron").exists()


@pytest.mark.parametrize("name", ["latest_checkpointed_iteration.txt", "release/metadata.json", "release/__0_0.distcp"])
def test_what_may_not_be_read_of_a_checkpoint(
    ordinary_user: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    megatron = ordinary_user / "megatron"
    hf_to_megatron(save_tiny_model(ordinary_user / "original"), megatron)
    (megatron / name).chmod(0)
    assert convert_checkpoint.main(["megatron-to-hf", str(megatron), str(ordinary_user / "back")]) == 2
    assert str((megatron / name).parent) in capsys.readouterr().err.splitlines()[-1]
    assert not (ordinary_user / "back").exists()


def test_too_little_room_on_the_disk(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, megatron = make_folder(), tmp_path / "megatron"
    hf_to_megatron(original, megatron)
    before = all_files(tmp_path)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match=r"0\.1 GiB are needed, 0\.0 GiB are free"):
        hf_to_megatron(original, tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"0\.1 GiB are needed, 0\.0 GiB are free"):
        megatron_to_hf(megatron, tmp_path / "back")
    assert all_files(tmp_path) == before


def test_no_checkpoint_in_the_folder(make_folder: MakeFolder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "empty", "no checkpoint here")):
        with pytest.raises(CheckpointError, match=message):
            megatron_to_hf(folder, tmp_path / "back")
    megatron = tmp_path / "megatron"
    hf_to_megatron(make_folder(), megatron)
    with pytest.raises(CheckpointError, match=r"Hugging Face folder: are the two arguments swapped\?"):
        megatron_to_hf(tmp_path / "original", tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"Megatron checkpoint: are the two arguments swapped\?"):
        hf_to_megatron(megatron, tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"no such folder \(give a downloaded model, not its name on the hub\)"):
        hf_to_megatron("org/model", tmp_path / "again")
    with pytest.raises(CheckpointError, match="a file, not a folder"):
        megatron_to_hf(tmp_path / "original" / "config.json", tmp_path / "back")
    with pytest.raises(CheckpointError, match="this is one iteration"):
        megatron_to_hf(megatron / "release", tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"--iteration 7: .*iter_0000007 does not exist"):
        megatron_to_hf(megatron, tmp_path / "back", iteration=7)
    (megatron / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(CheckpointError, match="names 12, but"):
        megatron_to_hf(megatron, tmp_path / "back")
    (megatron / "latest_checkpointed_iteration.txt").write_text("newest")
    with pytest.raises(CheckpointError, match="'newest' is neither"):
        megatron_to_hf(megatron, tmp_path / "back")


def test_newest_iteration_is_the_trackers(make_folder: MakeFolder, tmp_path: Path) -> None:
    """An iteration whose saving was cut off is newer than the tracker says, and not taken."""
    megatron = tmp_path / "megatron"
    hf_to_megatron(make_folder(), megatron)
    (megatron / "release").rename(megatron / "iter_0000012")
    (megatron / "iter_0000013").mkdir()
    (megatron / "latest_checkpointed_iteration.txt").write_text("12\n")
    megatron_to_hf(megatron, tmp_path / "back")
    (megatron / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="choose one with --iteration"):
        megatron_to_hf(megatron, tmp_path / "back2")
    megatron_to_hf(megatron, tmp_path / "back2", iteration=12)
    assert all_files(tmp_path / "back") == all_files(tmp_path / "back2")


def test_damaged_megatron_checkpoints(make_folder: MakeFolder, tmp_path: Path) -> None:
    original, good = make_folder(), tmp_path / "good"
    hf_to_megatron(original, good)

    def refused(name: str, content: bytes | None, message: str) -> None:
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        (bad / name).unlink() if content is None else (bad / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            megatron_to_hf(bad, tmp_path / "back")
        assert not (tmp_path / "back").exists()

    data = (good / "release" / "__0_0.distcp").read_bytes()
    refused("release/metadata.json", None, "no metadata.json: not a torch_dist checkpoint")
    refused("release/metadata.json", b'{"sharded_backend": "zarr"}', "the format is zarr; only torch_dist")
    refused("release/metadata.json", b"[]", r"metadata\.json: can't be read")
    refused("release/.metadata", None, "no .metadata: the checkpoint is incomplete")
    refused("release/.metadata", b"\x80\x04", r"\.metadata: can't be read")
    refused("release/__0_0.distcp", None, r"__0_0\.distcp: the arguments that training had can't be read")
    refused("release/__0_0.distcp", data[: len(data) // 2], r"tensor decoder\.layers\.\S+, layer \d can't be read")
    refused("hf/config.json", None, "no hf/config.json; copy the hf folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vocab_size": 152},
            r"embedding.word_embeddings.weight has shape \[151, 64\], but by config.json it has \[152",
        ),
        (
            {"num_hidden_layers": 3, "layer_types": None},
            r"has shape \[4, 96, 64\], but by config.json it has \[3, 96, 64\]",
        ),
        ({"tie_word_embeddings": True}, "tensor output_layer.weight is not part of the model"),
    ],
)
def test_config_that_contradicts_the_checkpoint(
    make_folder: MakeFolder, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    hf_to_megatron(make_folder(), tmp_path / "megatron")
    edit_config(tmp_path / "megatron" / "hf", **change)
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")


def test_a_parameter_that_the_checkpoint_lacks(make_folder: MakeFolder, tmp_path: Path) -> None:
    hf_to_megatron(make_folder(tied=True), tmp_path / "megatron")
    edit_config(tmp_path / "megatron" / "hf", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"tensor output_layer\.weight is missing"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")


def test_command_line(make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, megatron, back = make_folder(), str(tmp_path / "megatron"), str(tmp_path / "back")
    run = convert_checkpoint.main
    assert run(["hf-to-megatron", str(original), megatron]) == 0
    assert run(["megatron-to-hf", megatron, back, "--max-shard-size", "100KB"]) == 0
    assert run(["verify", back, megatron]) == 0
    assert "51 of 51 tensors equal bit by bit" in capsys.readouterr().out
    changed = load_tensors(original)["model.layers.2.self_attn.v_proj.weight"]
    changed[3, 5] += 0.5
    spoil(original, "model.layers.2.self_attn.v_proj.weight", changed)
    assert run(["verify", str(original), megatron]) == 1
    said = capsys.readouterr().out
    assert "differs: model.layers.2.self_attn.v_proj.weight\n50 of 51" in said
    assert run(["megatron-to-hf", megatron, back]) == 2
    assert capsys.readouterr().err == f"error: {back} exists already; --force replaces it\n"


def test_verify_shows_a_number_that_is_none(make_folder: MakeFolder, tmp_path: Path) -> None:
    original = make_folder()
    hf_to_megatron(original, tmp_path / "megatron")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensor = load_tensors(original)[name]
    tensor[0, 0], tensor[-1, -1] = float("nan"), 9.0
    spoil(original, name, tensor)
    (row,) = (row for row in verify(original, tmp_path / "megatron") if row.differing)
    assert row.differing == (name,)
    assert math.isnan(row.largest_difference)


def test_verify_refuses_another_model(make_folder: MakeFolder, tmp_path: Path) -> None:
    original = make_folder()
    hf_to_megatron(original, tmp_path / "megatron")
    edit_config(original, rms_norm_eps=1e-5)
    message = r"not the same model: layernorm_epsilon is 1e-05 in \S+original/config\.json, 1e-06 in \S+hf/config"
    with pytest.raises(CheckpointError, match=message):
        verify(original, tmp_path / "megatron")


@pytest.mark.parametrize("side", ["original", "megatron/hf"])
def test_verify_says_which_config_it_does_not_understand(make_folder: MakeFolder, tmp_path: Path, side: str) -> None:
    hf_to_megatron(make_folder(), tmp_path / "megatron")
    edit_config(tmp_path / side, logit_scale=0.5)
    with pytest.raises(CheckpointError, match=rf"{side}/config\.json: logit_scale"):
        verify(tmp_path / "original", tmp_path / "megatron")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": None}, "num_attention_heads is 4, but"),
        ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, "rotary_base is 500000, but"),
        ({"rms_norm_eps": 1e-5}, "layernorm_epsilon is 1e-05, but"),
    ],
)
def test_the_config_of_another_model_beside_a_checkpoint(
    make_folder: MakeFolder, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """Of the same shapes: the arguments that the checkpoint was saved with tell."""
    hf_to_megatron(make_folder(), tmp_path / "megatron")
    edit_config(tmp_path / "megatron" / "hf", **change)
    with pytest.raises(CheckpointError, match=rf"hf/config\.json: {message} \S+release was saved with"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
