"""The demo's tokenizer and model: folders that transformers loads, and a fit whose shared prompts change nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import make_tiny_model
from examples.data import generate_preferences, train_tokenizer
from megatron_amopo.data.tokenize import tokenizer_fingerprint


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    records, _ = generate_preferences.generate(seed=1, records=300, held_out=1)
    generate_preferences.write_jsonl(folder / "train.jsonl", records)
    texts = train_tokenizer.demo_texts(folder / "train.jsonl", train_tokenizer.PROMPTS)
    train_tokenizer.save_tokenizer(train_tokenizer.train_tokenizer(texts), folder / "tokenizer")
    return folder / "tokenizer"


def test_tokenizer_round_trip(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    for text in ("Hello! * Rome - Delhi done", "  two  spaces\n\ttab", "ünïcödé 你好 \U0001f600", "Paris,Rome;x/y", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 500 <= len(tokenizer) <= 1000
    assert len(tokenizer) % 128


def test_tokenizer_template_and_special_tokens(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer_fingerprint(tokenizer_folder).end_of_turn_id == tokenizer.eos_token_id


def test_words_of_the_task_are_single_tokens(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    for word in (" Canberra", " mice", " dashes", " instruction", "assistant"):
        assert len(tokenizer.encode(word)) == 1, word


def test_shared_prompts_give_the_log_probabilities_of_separate_sequences() -> None:
    torch.manual_seed(0)
    model = make_tiny_model.build_model(vocab_size=50, end_of_turn=2, pad=0, seed=1).eval()
    draw = torch.Generator().manual_seed(1)
    shapes = [(7, 3, 5), (4, 6, 1), (9, 2, 2)]

    def ids(count: int) -> np.ndarray:
        return torch.randint(3, 50, (count,), generator=draw).numpy()

    pairs = [(ids(prompt), ids(chosen), ids(rejected)) for prompt, chosen, rejected in shapes]
    with torch.no_grad():
        packed = make_tiny_model.response_logps(model, make_tiny_model.pack_pairs(pairs))
        separate = []
        for prompt, *responses in pairs:
            for response in responses:
                sequence = torch.tensor([[*prompt, *response]])
                logps = torch.log_softmax(model(sequence).logits[0, len(prompt) - 1 : -1], -1)
                separate.append(logps[torch.arange(len(response)), torch.tensor(response)])
    torch.testing.assert_close(packed, torch.cat(separate), rtol=1e-5, atol=1e-5)


def test_model_folder_loads_and_is_seeded(tmp_path: Path) -> None:
    models = [make_tiny_model.build_model(vocab_size=700, end_of_turn=2, pad=0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (model.model.layers[0].self_attn.q_proj.weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    models[0].save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, first)
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.eos_token_id == 2
    # what TP 2 and PP 2 divide
    config = loaded.config
    assert not any(n % 2 for n in (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads))
    assert sum(parameter.numel() for parameter in loaded.parameters()) < 1_000_000
