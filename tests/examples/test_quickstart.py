"""The demo's driver: what it runs, where it writes, and what it never deletes. Running it whole is `make demo`."""

from pathlib import Path

import pytest

from examples import quickstart


def test_replaces_an_earlier_demo_only(tmp_path: Path) -> None:
    folder = tmp_path / "runs/demo"
    quickstart.new_folder(folder)
    (folder / "old.txt").write_text("from an earlier demo")
    quickstart.new_folder(folder)
    assert not (folder / "old.txt").exists()

    other = tmp_path / "thesis"
    other.mkdir()
    quickstart.new_folder(other)  # empty: may be used
    (other / quickstart.MARKER).unlink()
    (other / "chapter.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="isn't a demo's folder"):
        quickstart.new_folder(other)
    assert (other / "chapter.txt").read_text() == "precious"


def test_refusing_a_folder_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(["--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"--output {tmp_path} exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "flag"),
    [("tp2", "--tensor-model-parallel-size"), ("pp2", "--pipeline-model-parallel-size"), ("dp2", None)],
)
def test_the_layout_reaches_training(tmp_path: Path, layout: str, flag: str | None) -> None:
    steps = {step.name: step for step in quickstart.demo_steps(tmp_path, layout, train_steps=7)}
    command = list(steps["train"].command)
    parallel = [word for word in command if word.endswith("parallel-size")]
    assert parallel == ([flag] if flag else [])
    if flag:
        assert command[command.index(flag) + 1] == "2"
    assert command[command.index("--train-iters") + 1] == "7"
    assert command[command.index("--nproc-per-node") + 1] == "2"


def test_scripts_of_the_steps_exist(tmp_path: Path) -> None:
    for step in quickstart.demo_steps(tmp_path, "tp2", train_steps=1):
        for word in step.command[1:]:
            if word.endswith((".py", ".yaml")):
                assert (quickstart.ROOT / word).is_file(), word


def test_steps_run_without_gpu_or_network_on_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = quickstart.child_environment()
    assert environment["PYTHONPATH"].startswith(str(quickstart.ROOT))
    assert environment["PYTHONPATH"].endswith("/elsewhere")
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
