"""An exported chat template: unchanged without `want`, the training data's tokens with it, left alone where unsure."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.model_prompts import ModelPrompts
from megatron_amopo.data.prompts import PromptStyle, built_in_styles
from megatron_amopo.data.template_extension import NotExtended, extended_template, original_template
from megatron_amopo.errors import ConfigError, DataError
from tests.data.conftest import CHATML, native
from tests.support.shared import SHARED_DATA

TRAINED = ("general", "a", "b")
QUESTION = [{"role": "user", "content": "Why?"}]
TURNS = [{"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": "So."}, *QUESTION]
#: Uses messages in a macro and in a loop, and begins and ends with white space of its own.
AWKWARD = (
    "  \n{% macro show(m) %}[{{ m['role'] }}|{{ messages | length }}] {{ m['content'] }}</s>{% endmacro %}\n"
    "{%- for message in messages %}{{ show(message) }}\n{% endfor %}{% if add_generation_prompt %}[go]{% endif %}\n "
)


def prompts_of(style: str = "published_system", trained: tuple[str, ...] = TRAINED) -> ModelPrompts:
    return ModelPrompts(PromptStyle.load(style), ("a", "b"), trained)


@pytest.mark.parametrize("style", built_in_styles())
def test_the_template_gives_the_tokens_of_the_prepared_data(prepared, tokenizer_dir, style):
    """Every prompt of a record with a system turn and a turn of before, scores between the steps of the scale too."""
    records = [
        native(prompt=QUESTION, chosen_scores=(5, 2.5)),
        native(prompt=TURNS, chosen_scores=(3.25, 4)),
    ]
    groups, _ = prepared(records, prompts=style, cutoff_len=None)
    prompts = ModelPrompts.of_run(groups.manifest, groups.dimensions)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = extended_template(tokenizer.chat_template, prompts)

    for index, record in enumerate(records):
        a, b = record["chosen"]["scores"].values()
        # In the nested style a prompt holds those of the dimensions before it.
        second = {"a": a, "b": b} if style == "released" else {"b": b}
        for want, ids in zip(("general", {"a": a}, second), groups[index].prompts, strict=True):
            found = tokenizer.apply_chat_template(
                record["prompt"], want=want, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert found == ids.tolist(), (want, index)


@pytest.mark.parametrize("template", [CHATML, AWKWARD], ids=["chatml", "awkward"])
@pytest.mark.parametrize("style", built_in_styles())
def test_nothing_changes_without_want(tokenizer_dir, style, template):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    prompts = prompts_of(style)
    extended = extended_template(template, prompts)
    assert extended != template
    for messages in (QUESTION, TURNS, TURNS[:3]):
        for start in (True, False):
            texts = [
                tokenizer.apply_chat_template(
                    messages, chat_template=each, add_generation_prompt=start, tokenize=False, **more
                )
                for each, more in ((template, {}), (extended, {}), (extended, {"want": None}))
            ]
            assert texts[0] == texts[1] == texts[2]
    assert original_template(extended) == template
    assert extended_template(extended, prompts) == extended
    # A second training under other prompts replaces the first one's.
    other = prompts_of("question_first")
    assert extended_template(extended, other) == extended_template(template, other)


@pytest.mark.parametrize(
    ("want", "said"),
    [
        ({"c": 5}, "no dimension c among those trained: a, b"),
        ({"a": 6}, "score of a is a number from 1 to 5"),
        ({"a": float("nan")}, "score of a"),
        ({"a": "5"}, "score of a"),
        ({}, "want is"),
        ("helpful", "want is"),
    ],
)
def test_what_was_not_trained_is_refused(tokenizer_dir, want, said):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = extended_template(CHATML, prompts_of())
    with pytest.raises(Exception, match=said):
        tokenizer.apply_chat_template(QUESTION, want=want, tokenize=False)


@pytest.mark.parametrize("style", built_in_styles())
def test_a_list_of_content_parts_is_refused(tokenizer_dir, style):
    """It isn't written into the prompt as Python shows it; turns that the prompt doesn't touch stay the template's."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = extended_template(
        "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}{% endfor %}",
        prompts_of(style),
    )
    parts = [{"type": "text", "text": "Why?"}]
    system = PromptStyle.load(style).placement == "system"
    touched = [{"role": "system" if system else "user", "content": parts}, *(QUESTION if system else [])]
    assert "Why?" in tokenizer.apply_chat_template(touched, tokenize=False)
    with pytest.raises(Exception, match="want: the turn that takes the prompt has to be text, not a list of parts"):
        tokenizer.apply_chat_template(touched, want="general", tokenize=False)
    untouched = [{"role": "user", "content": parts}, *QUESTION]
    assert tokenizer.apply_chat_template(untouched, want="general", tokenize=False).count("Why?") == 2


def test_only_trained_dimensions_are_offered(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    prompts = prompts_of(trained=("b",))
    tokenizer.chat_template = extended_template(CHATML, prompts)
    assert "score of 4 out of 5 for b" in tokenizer.apply_chat_template(QUESTION, want={"b": 4}, tokenize=False)
    for want in ("general", {"a": 4}):
        with pytest.raises(Exception, match="want: "):
            tokenizer.apply_chat_template(QUESTION, want=want, tokenize=False)
        with pytest.raises(ConfigError, match="trained"):
            prompts.conversation(QUESTION, {} if want == "general" else want)


def test_several_wanted_are_the_general_prompt_and_each_own():
    style = PromptStyle.load("published_user")
    general, a, b = style.texts(("a", "b"), (4, 5))
    assert style.wanted_text(("a", "b"), {"b": 5, "a": 4}) == f"{general}\n\n{a}\n\n{b}"
    assert style.wanted_text(("a", "b"), {"b": 5}) == b
    assert style.wanted_text(("a", "b"), {}) == general
    nested = PromptStyle.load("released")
    assert nested.wanted_text(("a", "b"), {"b": 5, "a": 4}) == nested.texts(("a", "b"), (4, 5))[2]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ want }}{{ m['content'] }}{% endfor %}", "variable 'want' of its own"),
        ("{% if messages %}", "not valid Jinja"),
        ("{{ amopo_text is defined }}{{ messages }}", "in another way"),
        ("{{ conversation }}", "leaves them out"),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages }}", "fails on"),
    ],
)
def test_an_unsuitable_template_is_left_alone(template, reason):
    with pytest.raises(NotExtended, match=reason):
        extended_template(template, prompts_of())


def test_text_that_jinja_or_json_would_change(tokenizer_dir):
    """Braces, quotes, backslashes and characters beyond the basic plane, in prompts and in names."""
    content = dict(PromptStyle.load("published_user").content)
    content |= {"descriptions": {"it's": "\"{{ x }}\" {% y %} %} \\n 'é' \N{GRINNING FACE} #}"}, "scale": {
        **content["scale"], "lowest": -1, "highest": 10
    }}  # fmt: skip
    prompts = ModelPrompts(PromptStyle.from_content(content), ("it's",), ("general", "it's"))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    extended = extended_template(CHATML, prompts)
    for score in (-1, 0, 10, 0.125):
        found = tokenizer.apply_chat_template(
            QUESTION, chat_template=extended, want={"it's": score}, tokenize=False, add_generation_prompt=True
        )
        expected = prompts.conversation(QUESTION, {"it's": score})
        assert found == tokenizer.apply_chat_template(expected, tokenize=False, add_generation_prompt=True)


def test_saved_and_loaded(tmp_path):
    assert ModelPrompts.load(tmp_path) is None
    prompts = prompts_of("released", ("general", "b"))
    prompts.save(tmp_path)
    loaded = ModelPrompts.load(tmp_path)
    assert (loaded.dimensions, loaded.trained, loaded.offered) == (("a", "b"), ("general", "b"), ("b",))
    assert loaded.conversation(TURNS, {"b": 2}) == prompts.conversation(TURNS, {"b": 2})
    (tmp_path / "amopo_prompts.json").write_text(json.dumps({"format_version": 1, "prompts": {}}))
    with pytest.raises(DataError, match=r"amopo_prompts\.json"):
        ModelPrompts.load(tmp_path)


def test_data_without_prompts_has_none(tmp_path):
    from megatron_amopo.certification.tiny import make_data

    make_data(tmp_path / "data", train=2, validation=0)
    assert ModelPrompts.of_run(Manifest.load(tmp_path / "data"), TRAINED) is None


@pytest.mark.skipif(not (SHARED_DATA / "qwen2.5-tokenizer").is_dir(), reason="needs Qwen2.5's tokenizer")
def test_qwen_template():
    """Qwen2.5's own template, which adds a system turn where there is none."""
    from megatron_amopo.data.tokenize import ChatTokenizer, TokenizerSource

    tokenizer = AutoTokenizer.from_pretrained(SHARED_DATA / "qwen2.5-tokenizer")
    trained_with, original = ChatTokenizer(TokenizerSource.of(tokenizer)), tokenizer.chat_template
    for prompts in map(prompts_of, built_in_styles()):
        tokenizer.chat_template = extended_template(original, prompts)
        for messages in (QUESTION, TURNS):
            for want in ({}, {"a": 4}, {"a": 1, "b": 4.5}):
                found = tokenizer.apply_chat_template(
                    messages, want=want or "general", add_generation_prompt=True, tokenize=True, return_dict=False
                )
                assert found == trained_with.encode_prompt(prompts.conversation(messages, want)).tolist()
