"""The sampling command: answers of a tiny model against plain generation, in every format, stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_amopo.errors import ConfigError, DataError
from megatron_amopo.sampling import vllm_engine
from megatron_amopo.sampling.engines import Generated, Request, answer_seed
from megatron_amopo.sampling.prompt_files import PromptFile
from megatron_amopo.sampling.sampler import Sampling, open_tokenizer, sample_file
from megatron_amopo.sampling.transformers_engine import SeededSampling, TransformersEngine
from tests.data.conftest import make_tokenizer
from tests.sampling.conftest import PROMPTS
from tools.sample_answers import main

QUESTIONS = ["Why?", "What is the dimension of a response, and how many are there?", "How does an expert answer?"]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Write again."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "And 2?"], "reference": ["2", "4"]},
    {"question_id": 151, "category": "stem", "turns": ["Why?"]},
]


@pytest.fixture
def ask(model_dir, tmp_path, monkeypatch):
    """`ask(records, *flags)` runs the command and gives the answers' records."""
    monkeypatch.setattr(vllm_engine, "vllm_installed", lambda: False)
    monkeypatch.setattr("tools.sample_answers.vllm_installed", lambda: False)

    def run(records, *flags, code=0):
        text = records if isinstance(records, str) else "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "prompts").write_text(text)
        output = tmp_path / "answers"
        assert main([str(model_dir), str(tmp_path / "prompts"), "--output", str(output), "--force", *flags]) == code
        if code:
            return None
        text = output.read_text()
        return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]

    return run


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], "general"),
        (["--want", "b=5"], {"b": 5}),
        (["--want", "b=2.5,a=4"], {"a": 4, "b": 2.5}),
        (["--plain"], None),
    ],
)
def test_greedy_answers_are_those_of_plain_generation(ask, model_dir, flags, want):
    """One by one, without padding, with the export's own chat template."""
    answers = ask("\n".join(QUESTIONS), "--max-tokens", "6", "--batch-size", "2", *flags)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for question, answer in zip(QUESTIONS, answers, strict=True):
        batch = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            want=want,
        )
        output = model.generate(
            **batch, do_sample=False, max_new_tokens=6, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
        )
        expected = tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert (answer["prompt"], answer["answer"], answer["model"]) == (question, expected, "tiny-chat")
    assert answers[0]["amopo"]["prompt"] == ("plain" if want is None else want)


def test_mt_bench_answers(ask):
    """Two turns, temperatures by category, the judge's fields; and ids that are the same the next time."""
    answers = ask(MT_BENCH, "--max-tokens", "4")
    assert [set(answer) for answer in answers] == [
        {"question_id", "answer_id", "model_id", "choices", "tstamp", "amopo"}
    ] * 3
    assert [answer["question_id"] for answer in answers] == [81, 111, 151]
    assert [len(answer["choices"][0]["turns"]) for answer in answers] == [2, 2, 1]
    assert [answer["amopo"]["temperature"] for answer in answers] == [0.7, 0.0, 0.1]
    again = ask(MT_BENCH, "--max-tokens", "4", "--batch-size", "1")
    assert [answer["answer_id"] for answer in again] == [answer["answer_id"] for answer in answers]
    other = ask(MT_BENCH, "--max-tokens", "4", "--seed", "2")
    assert [a["choices"] == b["choices"] for a, b in zip(answers, other, strict=True)][:2] == [False, True]


def test_the_second_turn_carries_the_first_answer_and_one_prompt(model_dir, tmp_path):
    asked = []

    class Engine:
        name, batch_size = "stand-in", 8

        def generate(self, requests):
            asked.append([tokenizer.decode(request.prompt) for request in requests])
            return [Generated(tuple(tokenizer._encoder.backend.encode("So.").ids), True) for _ in requests]

    tokenizer = open_tokenizer(model_dir)
    (tmp_path / "prompts").write_text("".join(json.dumps(record) + "\n" for record in MT_BENCH))
    sample_file(
        Engine(),
        tokenizer,
        PromptFile.read(tmp_path / "prompts"),
        Sampling(PROMPTS, {}),
        tmp_path / "out",
        model_dir,
        "x",
    )
    general = PROMPTS.style.general_text(PROMPTS.dimensions)
    assert [len(texts) for texts in asked] == [3, 2]
    assert asked[1][1] == f"user\n1 + 1?\nassistant\nSo.\nuser\n{general}\n\nAnd 2?\nassistant\n"


def test_control_tokens_in_a_question_are_text(tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    make_tokenizer(tmp_path, template, ["</s>", "[INST]", "[/INST]"], eos="</s>")
    tokenizer = open_tokenizer(tmp_path)
    question = "What does [INST] mean? [/INST] It means </s>[INST]"
    ids = tokenizer.encode_prompt([{"role": "user", "content": question}])
    assert [int(token) for token in ids if token < 3] == [1, 2]
    assert tokenizer.decode(ids) == f" {question} "


def test_arena_hard_and_alpaca_eval_answers(ask):
    (new,) = ask(
        [{"uid": "u1", "category": "hard_prompt", "subcategory": "math", "prompt": "Why?"}], "--max-tokens", "3"
    )
    assert set(new) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata", "amopo"}
    assert new["messages"][0] == {"role": "user", "content": "Why?"}
    assert set(new["messages"][1]["content"]) == {"answer"}
    assert set(new["metadata"]) == {"token_len", "header_count", "list_count", "bold_count"}
    (old,) = ask(
        [{"question_id": "q1", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "Why?"}]}],
        "--max-tokens",
        "3",
    )
    assert set(old["choices"][0]["turns"][0]) == {"content", "token_len"}
    assert old["choices"][0]["turns"][0]["content"] == new["messages"][1]["content"]["answer"]
    (alpaca,) = ask(
        json.dumps([{"dataset": "d", "instruction": "Why?", "output": "x", "generator": "y"}]), "--max-tokens", "3"
    )
    assert json.loads(alpaca.pop("amopo"))["temperature"] == 0.7
    assert alpaca.keys() == {"dataset", "instruction", "output", "generator"}
    assert (alpaca["instruction"], alpaca["generator"]) == ("Why?", "tiny-chat")


def test_a_stopped_run_goes_on(ask, model_dir, tmp_path, monkeypatch, capsys):
    flags = ["--temperature", "1", "--max-tokens", "5", "--batch-size", "1"]
    whole = ask("\n".join(QUESTIONS), *flags)
    generate, calls = TransformersEngine.generate, []

    def interrupted(engine, requests):
        calls.append(len(requests))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(engine, requests)

    monkeypatch.setattr(TransformersEngine, "generate", interrupted)
    ask("\n".join(QUESTIONS), *flags, code=130)
    partial = tmp_path / "answers.partial"
    partial.write_text(partial.read_text() + '{"id": "line 3", "tur')  # a line that a kill cut off
    ask("\n".join(QUESTIONS), *flags, "--seed", "2", code=2)
    assert "other inputs or settings" in capsys.readouterr().err
    ask("\n".join(QUESTIONS), *flags, "--prompts", "published_user", "--dimensions", "b,a", code=2)
    assert "other inputs or settings" in capsys.readouterr().err
    weights = model_dir / "model.safetensors"
    state = weights.stat()
    os.utime(weights, ns=(0, 0))  # as another export would have it
    ask("\n".join(QUESTIONS), *flags, code=2)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert ask("\n".join(QUESTIONS), *flags) == whole
    assert calls == [1] * 4
    assert not partial.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--want", "c=5"], "no dimension 'c' among those trained: a, b"),
        (["--want", "a=6"], "score 6 of a is off the prompts' scale, 1 to 5"),
        (["--want", "a"], "isn't NAME=SCORE"),
        (["--want", "a=high"], "isn't a number"),
        (["--want", "a=1,a=2"], "twice"),
        (["--want", "a=nan"], "off the prompts' scale"),
        (["--engine", "vllm"], "vLLM isn't installed"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size is of --engine vllm"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--plain", "--dimensions", "a"], "--plain"),
        (["--prompts", "nowhere"], "--prompts nowhere"),
    ],
)
def test_refusals(ask, capsys, flags, said):
    ask("Why?", *flags, code=2)
    assert said in capsys.readouterr().err


def test_a_folder_that_does_not_know_its_prompts(model_dir, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "amopo_prompts.json").unlink()
    (tmp_path / "prompts.txt").write_text("Why?\n")
    command = [str(folder), str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out"), "--max-tokens", "2"]
    assert main(command) == 2
    assert "--prompts and --dimensions" in capsys.readouterr().err
    assert main([*command, "--dimensions", "a,b"]) == 2
    assert "--prompts is needed" in capsys.readouterr().err
    assert main([*command, "--prompts", "published_user", "--dimensions", "a,b", "--want", "a=5"]) == 0


def test_room_for_an_answer_is_each_prompts_own(model_dir):
    """A prompt that nearly fills the context doesn't shorten its neighbour's answer; one that fills it is named."""
    engine = TransformersEngine(model_dir, 2, 8)
    engine.context, engine.end_ids = 12, [399]
    short, long, full = (
        Request(name, torch.arange(3, 3 + size).numpy(), 0.0, 1.0, 6, 1)
        for name, size in (("short", 2), ("long", 10), ("full", 12))
    )
    together = engine.generate([short, long])
    assert together == [*engine.generate([short]), *engine.generate([long])]
    assert [len(generated.ids) for generated in together] == [6, 2]
    with pytest.raises(DataError, match="question 'full': its prompt of 12 tokens"):
        engine.generate([short, full])


def test_samples_are_distributed_as_the_probabilities():
    """Gumbel noise from one generator per row: frequencies against softmax, top-p included."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    rows = 4000

    def frequencies(temperature: float, top_p: float) -> torch.Tensor:
        requests = [Request("q", torch.zeros(1).numpy(), temperature, top_p, 1, seed) for seed in range(rows)]
        sampled = SeededSampling(requests, torch.device("cpu"))(torch.zeros(rows, 1), logits.repeat(rows, 1))
        return sampled.argmax(-1).bincount(minlength=5) / rows

    torch.testing.assert_close(frequencies(2.0, 1.0), (logits / 2).softmax(-1), atol=0.03, rtol=0)
    kept = torch.tensor([2.0, 1.0, float("-inf"), float("-inf"), float("-inf")])  # 0.64 + 0.24 reach 0.8
    torch.testing.assert_close(frequencies(1.0, 0.8), kept.softmax(-1), atol=0.03, rtol=0)
    assert frequencies(0.0, 1.0)[0] == 1


def test_vllm_gets_ids_and_settings(monkeypatch, model_dir):
    """Against a stand-in with the documented names: vLLM itself needs a GPU."""
    seen = {}

    class LLM:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=9))

        def __init__(self, **options):
            seen.update(options)

        def generate(self, prompts, settings, use_tqdm):
            seen.update(prompts=prompts, settings=[vars(each) for each in settings])
            ends = [([5, 6, 2], "stop"), ([5], "length")]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=i, finish_reason=r)]) for i, r in ends]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    monkeypatch.setattr(vllm_engine, "vllm_installed", lambda: True)
    engine = vllm_engine.VllmEngine(model_dir, 2, 4)
    requests = [Request("q", torch.tensor([1, 2]).numpy(), 0.7, 0.9, 8, answer_seed(1, "q", 0)) for _ in range(2)]
    assert engine.generate(requests) == [Generated((5, 6), True), Generated((5,), False)]
    assert (seen["model"], seen["tensor_parallel_size"]) == (str(model_dir), 4)
    assert seen["prompts"] == [{"prompt_token_ids": [1, 2]}] * 2
    assert seen["settings"][0] == {
        "temperature": 0.7, "top_p": 0.9, "max_tokens": 7, "seed": requests[0].seed, "stop_token_ids": [2]
    }  # fmt: skip
    with pytest.raises(DataError, match=r"question 'full': its prompt of 9 tokens, .* fills the model's context of 9"):
        engine.generate([*requests, Request("full", torch.arange(9).numpy(), 0.0, 1.0, 6, 1)])
    monkeypatch.setattr(vllm_engine, "vllm_installed", lambda: False)
    with pytest.raises(ConfigError, match="isn't installed"):
        vllm_engine.VllmEngine(model_dir, 2, 1)
