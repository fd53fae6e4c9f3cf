"""A tiny random model that chats: as an export of training, with its prompts and an extended chat template; and the
scoring command.
"""

import json
from pathlib import Path

import pytest

from megatron_amopo.certification.tiny import make_hf_model
from megatron_amopo.checkpoint.hf_template import offer_prompts
from megatron_amopo.data.model_prompts import ModelPrompts
from megatron_amopo.data.prompts import PromptStyle
from tests.data.conftest import make_tokenizer
from tools import score_answers

#: Answers in the plain format.
PLAIN = [{"id": "1", "prompt": "Why?", "answer": "Why? So."}, {"id": "2", "prompt": "How?", "answer": "No."}]
PROMPTS = ModelPrompts(PromptStyle.load("published_user"), ("a", "b"), ("general", "a", "b"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    folder = make_tokenizer(tmp_path_factory.mktemp("sampling") / "tiny-chat")
    make_hf_model(folder, vocab_size=400, hidden_size=32, num_hidden_layers=2, max_position_embeddings=4096)
    PROMPTS.save(folder)
    offer_prompts(folder)
    return folder


@pytest.fixture
def score(tmp_path, capsys):
    """`score(records, scorer, *flags)` runs the command and gives the scores' records."""

    def run(records, scorer, *flags, code=0):
        (tmp_path / "answers").write_text("".join(json.dumps(record) + "\n" for record in records))
        output = tmp_path / "scores"
        command = [str(tmp_path / "answers"), "--scorer", scorer, "--output", str(output), "--force", *flags]
        assert score_answers.main(command) == code
        return (
            [json.loads(line) for line in output.read_text().split("\n")[:-1]] if code == 0 else capsys.readouterr().err
        )

    return run
