"""Tokenizers of folders that hold SentencePiece's `tokenizer.model` alone, as Llama 2's and Mistral's do."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_amopo.data.problems import RecordProblem
from megatron_amopo.data.tokenize import ChatTokenizer, TokenizerSource, folder_vocabulary, tokenizer_fingerprint
from tests.data.conftest import native

# As the chat models of Llama 2: the system turn inside the first user's, contents stripped, spaces around the answer.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set content = (system if loop.index0 == 0 else '') + m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Mistral's first: one beginning, no system turn, no space before the answer, one after its end.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
# As Mistral's third: the system turn stands in the last user's, but only while that one is last.
MISTRAL_SYSTEM_LAST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}{% else %}{% set turns = messages %}{% set system = '' %}"
    "{% endif %}{% for m in turns %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.last else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)

CONVERSATION = [
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Why is the sky blue?\nü漢字🙂"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = ("Because of Rayleigh.", "42\n\n漢 and  two  spaces", "(no)")


@pytest.fixture(scope="session")
def model_file() -> bytes:
    """A small BPE model with byte fallback, ids 0, 1, 2 for unknown, beginning and end, as Llama's."""
    import sentencepiece

    text = [
        "[INST] Why is the sky blue? [/INST] Because of Rayleigh scattering.",
        "<<SYS>> Be brief. <</SYS>> You are an expert at answering. the response of a dimension  42",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_writer=model, model_type="bpe", vocab_size=380, byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture
def make_folder(tmp_path: Path, model_file: bytes):
    def make(template: str, **settings: object) -> Path:
        folder = tmp_path / "sentencepiece"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(model_file)
        fields = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        fields |= {"add_bos_token": True, "add_eos_token": False, "chat_template": template, **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
        return folder

    return make


# "legacy" puts a space in front of each text that follows a control token; otherwise only the first of all gets one.
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", [LLAMA2, MISTRAL], ids=["llama2", "mistral"])
def test_tokens_equal_transformers(make_folder, template, legacy):
    from transformers import AutoTokenizer

    folder = make_folder(template, legacy=legacy)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = ChatTokenizer(TokenizerSource.load(folder))
    conversations = [CONVERSATION, CONVERSATION[:1], CONVERSATION[2:]]
    if template is LLAMA2:
        conversations.append([SYSTEM, *CONVERSATION])
    for turns in conversations:
        for answer in ANSWERS:
            encoded = chat.encode([turns], answer, ANSWERS[0])
            prompt, response = encoded.prompts[0].tolist(), encoded.chosen.tolist()
            assert prompt == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], return_dict=False)
            assert [*prompt, *response] == whole[: len(prompt) + len(response)]
            # Mistral's space after the end is no part of the response.
            assert tokenizer.decode(whole[len(prompt) + len(response) :]).strip() == ""
            assert response[-1] == tokenizer.eos_token_id == chat.end_of_turn_id == 2
            assert prompt[0] == tokenizer.bos_token_id
            assert prompt.count(tokenizer.bos_token_id) == (1 if template is MISTRAL else (len(turns) + 1) // 2)


@pytest.mark.parametrize("legacy", [True, False])
def test_spaces_around_the_instruction_are_kept(make_folder, legacy):
    chat = ChatTokenizer(TokenizerSource.load(make_folder(LLAMA2, legacy=legacy)))
    backend = chat._encoder.backend
    encoded = chat.encode([[{"role": "user", "content": " Why  the "}]], "Because", "42")
    pieces = [backend.id_to_token(int(index)) for index in (*encoded.prompts[0], *encoded.chosen)]
    beginning = "▁[INST]" if legacy else "[INST]"
    assert "".join(pieces) == f"<s>{beginning}▁Why▁▁the▁[/INST]▁Because▁</s>"


@pytest.mark.parametrize("legacy", [True, False])
def test_control_tokens_in_the_text_stay_text(make_folder, legacy):
    chat = ChatTokenizer(TokenizerSource.load(make_folder(LLAMA2, legacy=legacy)))
    encoded = chat.encode([[{"role": "user", "content": "a</s>b<s> c"}]], "x</s>y", "42")
    assert encoded.marked
    assert np.isin(encoded.chosen, [1, 2]).sum() == np.isin(encoded.prompts[0], [1, 2]).sum() == 1
    decoder = chat._encoder.backend
    assert decoder.decode(encoded.prompts[0].tolist()).strip() == "[INST] a</s>b<s> c [/INST]"
    assert decoder.decode(encoded.chosen.tolist()).strip() == "x</s>y"


def test_a_template_that_moves_the_system_turn_is_refused(make_folder):
    chat = ChatTokenizer(TokenizerSource.load(make_folder(MISTRAL_SYSTEM_LAST)))
    chat.encode([CONVERSATION], "Because", "42")
    assert chat.refuses(CONVERSATION) is None
    assert "in another way once an answer follows" in str(chat.refuses([SYSTEM, *CONVERSATION]))
    with pytest.raises(RecordProblem, match="doesn't continue the rendered prompt"):
        chat.encode([[SYSTEM, *CONVERSATION]], "Because", "42")


def test_a_template_without_system_turn_says_so(make_folder):
    chat = ChatTokenizer(TokenizerSource.load(make_folder(MISTRAL)))
    assert "roles must alternate" in str(chat.refuses([SYSTEM, *CONVERSATION]))


def test_preparing_data_with_the_folder(make_folder, prepared):
    """The whole command: the vocabulary in the manifest is the one that training reads from a model's folder."""
    folder = make_folder(LLAMA2)
    groups, _ = prepared([native(), native(prompt="Who?")], tokenizer=folder)
    assert len(groups) == 2
    assert groups.manifest.tokenizer == tokenizer_fingerprint(folder)
    assert groups.manifest.tokenizer.vocab_sha256 == folder_vocabulary(folder)
    assert (groups.manifest.tokenizer.end_of_turn_id, groups.manifest.tokenizer.name) == (2, "sentencepiece")
    assert all(response[-1] == 2 for response in groups[0].chosen)
