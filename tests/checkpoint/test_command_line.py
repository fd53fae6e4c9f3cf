"""tools/convert_checkpoint.py: every flag reaches the conversion, and what goes wrong is a line and an exit code."""

from __future__ import annotations

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_amopo.checkpoint import hf_writer, streaming, tensor_files
from megatron_amopo.checkpoint.hf_files import INDEX
from tests.support.checkpoints import MakeFolder, all_files, edit_config, load_tensors
from tools import convert_checkpoint

IMPORT, EXPORT, VERIFY = "hf-to-megatron", "megatron-to-hf", "verify"
NORM = "model.norm.weight"


def run(*arguments: str | Path) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def fill_norm(folder: Path, number: float) -> None:
    """Make the last norm's weights of a single-file folder that number: another model."""
    tensors = load_tensors(folder)
    tensors[NORM] = torch.full_like(tensors[NORM], number)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> Path:
    """Replace a single-file folder's safetensors by `pytorch_model.bin`; gives that."""
    path = folder / "pytorch_model.bin"
    torch.save(load_tensors(folder), path)
    (folder / "model.safetensors").unlink()
    return path


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr; before it stands transformers' progress of saving the folder."""
    return capsys.readouterr().err.splitlines()[-1]


def arguments_of(command: str, hf: Path, megatron: Path, out: Path) -> list[str | Path]:
    """A command that reads what is there, and writes, if it does, to `out`."""
    return [command, *{IMPORT: (hf, out), EXPORT: (megatron, out), VERIFY: (hf, megatron)}[command]]


@pytest.fixture
def folders(make_folder: MakeFolder, tmp_path: Path) -> tuple[Path, Path]:
    """A Hugging Face folder and what it was imported to."""
    original, megatron = make_folder(), tmp_path / "megatron"
    assert run(IMPORT, original, megatron) == 0
    return original, megatron


@pytest.mark.parametrize("command", [IMPORT, EXPORT])
def test_force(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    original, megatron = folders
    out = tmp_path / "out"
    arguments = arguments_of(command, original, megatron, out)
    assert run(*arguments) == 0
    fill_norm(original, 2.0)
    assert run(IMPORT, original, megatron, "--force") == 0
    before = all_files(out)
    capsys.readouterr()
    assert run(*arguments) == 2
    assert capsys.readouterr().err == f"error: {out} exists already; --force replaces it\n"
    assert all_files(out) == before
    assert run(*arguments, "--force") == 0
    assert all_files(out) == all_files(megatron if command == IMPORT else original) != before


def test_allow_pickle(make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, megatron = make_folder(), tmp_path / "megatron"
    path = pickled(original)
    refusal = f"error: {path}: pickled weights are read only by tools/convert_checkpoint.py, with --allow-pickle"
    for command in (IMPORT, VERIFY):
        assert run(command, original, megatron) == 2
        assert last_error(capsys).startswith(refusal)
        assert run(command, original, megatron, "--allow-pickle") == 0


def test_iteration(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The older of two, and one that isn't there."""
    original, megatron = folders
    (megatron / "release").rename(megatron / "iter_0000001")
    fill_norm(original, 2.0)
    assert run(IMPORT, original, tmp_path / "other") == 0
    (tmp_path / "other" / "release").rename(megatron / "iter_0000002")
    (megatron / "latest_checkpointed_iteration.txt").write_text("2")
    assert run(EXPORT, megatron, tmp_path / "newest") == 0
    assert run(EXPORT, megatron, tmp_path / "older", "--iteration", "1") == 0
    assert torch.equal(load_tensors(tmp_path / "newest")[NORM], torch.full((64,), 2.0))
    assert not torch.equal(load_tensors(tmp_path / "older")[NORM], torch.full((64,), 2.0))
    for folder, right, wrong in (("older", "1", "2"), ("newest", "2", "1")):
        assert run(VERIFY, tmp_path / folder, megatron, "--iteration", right) == 0
        assert run(VERIFY, tmp_path / folder, megatron, "--iteration", wrong) == 1
    for arguments in ((EXPORT, megatron, tmp_path / "third"), (VERIFY, tmp_path / "newest", megatron)):
        capsys.readouterr()
        assert run(*arguments, "--iteration", "3") == 2
        assert capsys.readouterr().err.startswith("error: --iteration 3: ")
    assert not (tmp_path / "third").exists()


def test_the_logits_are_of_the_iteration_asked_for(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the text in the file; a forward pass of both is in tests/distributed."""
    original, megatron = folders
    (megatron / "release").rename(megatron / "iter_0000012")
    (megatron / "text").write_text("Grüße", encoding="utf-8")
    asked: list[dict[str, Any]] = []

    def compare_logits(*_: object, **options: Any) -> None:
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_checkpoint, "compare_logits", compare_logits)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tool sets it for its process
    arguments = ("--iteration", "12", "--logits", "--text", megatron / "text")
    assert run(VERIFY, original, megatron, *arguments) == 130
    assert asked == [{"iteration": 12, "text": "Grüße"}]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(folders: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    original, megatron = folders
    assert run(EXPORT, megatron, tmp_path / "half", "--dtype", dtype) == 0
    half, full = load_tensors(tmp_path / "half"), load_tensors(original)
    assert half.keys() == full.keys()
    assert all(torch.equal(half[name], full[name].to(getattr(torch, dtype))) for name in full)


def test_a_dtype_that_is_none(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(EXPORT, folders[1], tmp_path / "back", "--dtype", "int8")
    assert stop.value.code == 2
    assert "argument --dtype: invalid choice: 'int8'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [IMPORT, EXPORT, VERIFY])
def test_workers(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    asked: list[int] = []

    def pool(workers: int) -> ThreadPoolExecutor:
        asked.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(streaming, "ThreadPoolExecutor", pool)
    arguments = arguments_of(command, *folders, tmp_path / "out")
    before = all_files(tmp_path)
    capsys.readouterr()
    assert run(*arguments, "--workers", "0") == 2
    assert capsys.readouterr().err == "error: --workers 0: at least 1\n"
    assert all_files(tmp_path) == before
    assert run(*arguments, "--workers", "5") == 0
    assert asked == [5]


@pytest.mark.parametrize("command", [IMPORT, EXPORT])
def test_warnings_are_on_stderr(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    original, megatron = folders
    fill_norm(original, float("nan"))
    assert run(IMPORT, original, megatron, "--force") == 0
    capsys.readouterr()
    assert run(*arguments_of(command, original, megatron, tmp_path / "out")) == 0
    said = capsys.readouterr()
    assert said.err == f"warning: NaN or infinite numbers in {NORM}\n"
    assert "warning:" not in said.out
    assert f"{tmp_path / 'out'}: 51 tensors" in said.out


@pytest.mark.parametrize("command", [IMPORT, EXPORT, VERIFY])
def test_an_interruption(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """Ctrl-C in the middle of the weights: nothing is left, and what was to be replaced is as before."""
    arguments = arguments_of(command, *folders, tmp_path / "out")
    if command != VERIFY:
        assert run(*arguments) == 0
        arguments.append("--force")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = all_files(tmp_path)
    capsys.readouterr()
    kind, method = (hf_writer.HfWriter, "write") if command == EXPORT else (tensor_files.StoredTensor, "read")
    monkeypatch.setattr(kind, method, interrupted)
    assert run(*arguments) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert all_files(tmp_path) == before


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}])
def test_an_index_that_names_no_tensors(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, object]
) -> None:
    original = make_folder(max_shard_size="100KB")
    (original / INDEX).write_text(json.dumps(content))
    assert run(IMPORT, original, tmp_path / "megatron") == 2
    assert last_error(capsys) == f"error: {original / INDEX}: weight_map is missing or empty"
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("content", ["[]", "null", '"qwen2"'])
def test_json_that_is_no_object(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    original = make_folder(max_shard_size="100KB")
    (original / name).write_text(content)
    assert run(IMPORT, original, tmp_path / "megatron") == 2
    assert last_error(capsys) == f"error: {original / name}: not a JSON object"


def test_a_wrongly_typed_field(make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As json.loads reads it: NaN is no JSON, but Python's."""
    original = make_folder()
    edit_config(original, rms_norm_eps=float("nan"))
    assert run(IMPORT, original, tmp_path / "megatron") == 2
    assert last_error(capsys) == f"error: {original}/config.json: rms_norm_eps nan is not a finite number above 0"
    edit_config(original, rms_norm_eps=1e-6, dtype=["bfloat16"])
    assert run(IMPORT, original, tmp_path / "megatron") == 2
    assert last_error(capsys) == f"error: {original}/config.json: dtype ['bfloat16'] is not the name of a type"
    (original / "config.json").write_text("1" * 5000)
    assert run(IMPORT, original, tmp_path / "megatron") == 2
    assert "config.json: not JSON: Exceeds the limit" in last_error(capsys)


def test_a_record_that_was_cut(make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A zip archive that is whole, with one tensor's numbers cut short: the next record's bytes aren't taken for
    them."""
    original = make_folder()
    path = pickled(original)
    whole = path.rename(tmp_path / "whole.bin")
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:16] if name.endswith("/data/0") else old.read(name))
    assert run(IMPORT, original, tmp_path / "megatron", "--allow-pickle") == 2
    first = next(iter(torch.load(whole, weights_only=True)))
    assert last_error(capsys) == f"error: {path}: tensor {first}: a record is shorter than its tensor"


def test_a_model_that_transformers_does_not_load(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The architecture is enough for the converter; transformers goes by the model type."""
    original, megatron = folders
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tool sets it for its process
    edit_config(original, model_type=None)
    assert run(VERIFY, original, megatron) == 0
    assert run(VERIFY, original, megatron, "--logits") == 2
    assert last_error(capsys).startswith(f"error: {original}: transformers can't load the model: ")
