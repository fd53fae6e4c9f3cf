"""The model card: the hub's library reads it, it says what the run was, and it replaces no one else's."""

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from megatron_amopo.data.model_prompts import ModelPrompts
from megatron_amopo.data.prompts import PromptStyle
from megatron_amopo.data.template_extension import extended_template
from megatron_amopo.report.card import write_card
from megatron_amopo.report.files import ReportError
from tests.support.run_folders import DIMENSIONS, write_data, write_run
from tools import report as command_line


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", steps=3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_the_hub_reads_it(run: Path, data: Path, model: Path) -> None:
    card = ModelCard.load(write_card(run, model, data, "Qwen/Qwen2.5-7B-Instruct"))
    assert card.data.base_model == "Qwen/Qwen2.5-7B-Instruct"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"amopo", "simpo"} <= set(card.data.tags)
    for expected in (
        "SHA-256 of the prepared data `0123456789abcdef",
        "On 400 validation records, after step 0 → after step 3",
        "| helpfulness | +0.110 → +0.410 | 53.0 → 83.0 (79.0–86.4) | 0.333 → 0.250 |",
        "| --amopo-beta | 10 |",
        "| learning rate | 0.001 |",
        "Write a response that deserves a score of 5 out of 5 for helpfulness.",
        "## Limitations",
    ):
        assert expected in card.text, expected
    assert str(run.parent) not in card.content


def test_the_example_is_python_with_the_trained_prompt(run: Path, data: Path, model: Path) -> None:
    text = write_card(run, model, data).read_text()
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    (messages,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "messages"
    ]
    assert [message["role"] for message in messages] == ["system", "user"]
    assert "deserves a score of 5 out of 5 for instruction following" in messages[0]["content"]


def test_the_prompts_of_an_export_and_its_template(run: Path, model: Path) -> None:
    prompts = ModelPrompts(PromptStyle.load("published_system"), DIMENSIONS[1:], DIMENSIONS)
    prompts.save(model)
    chat_ml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_ml}))
    text = write_card(run, model).read_text()
    assert "Write a response that deserves a score of 5 out of 5 for helpfulness." in text
    assert "want=" not in text
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": extended_template(chat_ml, prompts)}))
    assert 'want={"instruction_following": 5}' in write_card(run, model).read_text()


def test_a_run_of_which_little_is_known(tmp_path: Path, model: Path) -> None:
    run = write_run(tmp_path / "bare", steps=2, complete=False)
    card = ModelCard.load(write_card(run, model))
    assert card.data.base_model is None
    assert "The run wasn't evaluated." in card.text
    assert "The prompts of the dimensions aren't recorded here" in card.text


def test_a_recorded_base_model_is_named_only_as_the_hub_does(run: Path, model: Path) -> None:
    config = json.loads((run / "hf/config.json").read_text())
    for name, expected in (("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"), (str(model), None), ("models/qwen/7b", None)):
        (run / "hf/config.json").write_text(json.dumps(config | {"_name_or_path": name}))
        assert ModelCard.load(write_card(run, model)).data.base_model == expected


@pytest.mark.parametrize("flag", ["amopo_hf_model", "pretrained_checkpoint"])
def test_the_folder_that_the_run_started_from_is_no_hub_name(run: Path, model: Path, flag: str) -> None:
    """``models/qwen`` looks like a name of the hub, and another machine hasn't the folder to tell it by."""
    config = json.loads((run / "hf/config.json").read_text())
    (run / "hf/config.json").write_text(json.dumps(config | {"_name_or_path": "models/qwen"}))
    assert ModelCard.load(write_card(run, model)).data.base_model == "models/qwen"
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    starts[0]["arguments"][flag] = "models/qwen"
    (run / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    assert ModelCard.load(write_card(run, model)).data.base_model is None


def test_a_quotation_mark_in_a_cell_is_one_on_the_page(tmp_path: Path, model: Path) -> None:
    """Not an entity with its ``#`` escaped, which a browser shows as it stands."""
    text = write_card(write_run(tmp_path / "run", ("general", "it's"), steps=2), model).read_text()
    assert "it&#39;s" in text
    assert "\\#" not in text


def test_nothing_from_files_is_markup(tmp_path: Path, model: Path) -> None:
    names = ("general", "a|b", "<script>", "```\n# heading\n---")
    text = write_card(
        write_run(tmp_path / "run", names, steps=2), model, write_data(tmp_path / "data", names)
    ).read_text()
    assert "a\\|b" in text
    outside = re.sub(r"^(`{3,})[^`\n]*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside
    assert "\n# heading" not in outside
    assert text.count("\n---\n") - re.sub(r"\A---\n", "", outside).count("\n---\n") <= text.count("# heading\n---")
    assert ModelCard(text).data.library_name == "transformers"


def test_a_foreign_readme_stays(run: Path, data: Path, model: Path) -> None:
    readme = model / "README.md"
    readme.write_text("# Mine\n")
    with pytest.raises(ReportError, match=r"README\.md is there and wasn't written by this tool; --force"):
        write_card(run, model, data)
    assert readme.read_text() == "# Mine\n"
    write_card(run, model, data, force=True)
    assert "Mine" not in readme.read_text()
    write_card(run, model)  # its own it replaces
    assert sorted(path.name for path in model.iterdir()) == ["README.md", "config.json"]


def test_the_runs_own_record_of_its_model_takes_no_card(run: Path) -> None:
    with pytest.raises(ReportError, match=r"--model-card .*/hf: this is the run's own record of its model"):
        write_card(run, run / "hf", force=True)
    assert [path.name for path in (run / "hf").iterdir()] == ["config.json"]


def test_refuses_what_is_no_model_and_no_name(run: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ReportError, match=r"--base-model models/qwen/7b: not a name on the hub"):
        write_card(run, model, base_model="models/qwen/7b")
    assert command_line.main([str(run), "--model-card", str(run.parent)]) == 2
    assert "not an exported model (no config.json)" in capsys.readouterr().err
    assert command_line.main([str(run), "--model-card", str(model)]) == 0
    assert DIMENSIONS[1] in (model / "README.md").read_text()
