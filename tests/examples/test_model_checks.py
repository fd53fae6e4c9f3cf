"""The two looks at a model: its log-probabilities against written ones, and its own answers, scored."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import compare_logps, make_tiny_model, score_samples
from examples.data import generate_preferences, train_tokenizer
from examples.data.rules import DIMENSIONS
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.prompts import PromptStyle
from tools import prepare_preferences


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, tokenizer, prepared data, an unfitted model, and a file of its log-probabilities."""
    folder = tmp_path_factory.mktemp("demo")
    data, tokenizer, prepared, model = (folder / name for name in ("data", "tokenizer", "prepared", "model"))
    generate_preferences.main(["--output", str(data), "--records", "40", "--held-out", "6"])
    train_tokenizer.main(["--data", str(data / "train.jsonl"), "--output", str(tokenizer)])
    assert (
        prepare_preferences.main(
            [
                *(
                    str(data / "train.jsonl"),
                    "--validation-file",
                    str(data / "held_out.jsonl"),
                    "--output",
                    str(prepared),
                ),
                *("--tokenizer", str(tokenizer), "--dimensions", ",".join(DIMENSIONS), "--workers", "1"),
                *("--prompts", str(train_tokenizer.PROMPTS)),
            ]
        )
        == 0
    )
    make_tiny_model.main(
        [
            "--data",
            str(prepared),
            "--tokenizer",
            str(tokenizer),
            "--output",
            str(model),
            "--steps",
            "1",
            "--threads",
            "1",
        ]
    )
    _write_logps(folder)
    return folder


def test_model_and_tokenizer_folder_encode_alike(demo: Path) -> None:
    """transformers 5 rebuilds the tokenizer of a folder with a Qwen2 config from parts of its own."""
    folders = [AutoTokenizer.from_pretrained(str(demo / name)) for name in ("tokenizer", "model")]
    records = [json.loads(line) for line in (demo / "data/train.jsonl").read_text().splitlines()]
    texts = [text for record in records for text in (record["prompt"], record["chosen"]["content"])]
    for text in (*texts, "use 18 words,  don't\n\n x/y 12345 ünïcödé u\u0308 <|im_end|>"):
        assert folders[0].encode(text) == folders[1].encode(text)


def _write_logps(folder: Path) -> None:
    """The file of --amopo-dump-logps, from a forward pass per sequence."""
    groups = PreparedGroups.open(folder / "prepared", "validation")
    model = AutoModelForCausalLM.from_pretrained(str(folder / "model")).eval()
    with (folder / "logps.jsonl").open("w") as out:
        for index in range(len(groups)):
            group = groups[index]
            for number, dimension in enumerate(groups.dimensions):
                row = {"record_id": int(groups.record_ids[index]), "dimension": dimension}
                for side, tokens in (("chosen", group.chosen[number]), ("rejected", group.rejected[number])):
                    prompt = group.prompts[number]
                    ids = torch.tensor([[*prompt.tolist(), *tokens.tolist()]])
                    with torch.no_grad():
                        logps = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
                    row[side] = logps.gather(1, ids[0, len(prompt) :, None]).sum().item()
                    row[f"{side}_length"] = len(tokens)
                out.write(json.dumps(row) + "\n")


def _compare(demo: Path, logps: Path, *more: str) -> int:
    flags = ["--model", str(demo / "model"), "--data", str(demo / "prepared"), "--logps", str(logps), "--threads", "1"]
    return compare_logps.main([*flags, *more])


def test_equal_log_probabilities(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare(demo, demo / "logps.jsonl", "--batch", "7") == 0
    assert "equal: 48 responses" in capsys.readouterr().out
    assert _compare(demo, demo / "logps.jsonl", "--records", "2") == 0
    assert "equal: 16 responses" in capsys.readouterr().out


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_different_log_probabilities(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: float
) -> None:
    rows = [json.loads(line) for line in (demo / "logps.jsonl").read_text().splitlines()]
    rows[5]["rejected"] += change
    (tmp_path / "logps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _compare(demo, tmp_path / "logps.jsonl") == 1
    said = capsys.readouterr().out
    assert "DIFFERENT" in said
    assert f"record {rows[5]['record_id']}, {rows[5]['dimension']}, rejected" in said


@pytest.mark.parametrize(
    ("key", "value", "said"), [("record_id", 10**6, "no such record"), ("chosen_length", 1, "tokens")]
)
def test_log_probabilities_of_other_data(demo: Path, tmp_path: Path, key: str, value: int, said: str) -> None:
    rows = [json.loads(line) for line in (demo / "logps.jsonl").read_text().splitlines()]
    rows[3][key] = value
    (tmp_path / "logps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"logps\.jsonl:4: .*{said}"):
        _compare(demo, tmp_path / "logps.jsonl")


def test_samples_are_seeded_and_scored(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--data",
        str(demo / "data/held_out.jsonl"),
        "--requests",
        "3",
        "--threads",
        "1",
        "--json",
        str(demo / "scores.json"),
    ]
    score_samples.main(["--model", str(demo / "model"), "--model", str(demo / "model"), *flags])
    first, second = json.loads((demo / "scores.json").read_text())
    assert first == second
    assert tuple(first) == DIMENSIONS
    assert all(1 <= value <= 5 for value in first.values())
    assert "mean of 3" in capsys.readouterr().out


def test_samples_are_asked_under_the_general_prompt() -> None:
    [turns] = score_samples.general_conversations(["Name it."], score_samples.PROMPTS)
    general = PromptStyle.load(score_samples.PROMPTS).texts(DIMENSIONS, [1, 2, 3])[0]
    assert turns == [{"role": "system", "content": general}, {"role": "user", "content": "Name it."}]
