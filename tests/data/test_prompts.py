"""Dimension prompts: what each style says and where, and what a wrong file is told."""

import pytest

from megatron_amopo.data.prompts import PromptStyle, built_in_styles, format_score
from megatron_amopo.errors import ConfigError

USER = [{"role": "user", "content": "Why is the sky blue?"}]
DIMENSIONS = ("helpfulness", "instruction_following", "zest")

MINIMAL = {
    "style": "published",
    "placement": "user",
    "scale": {"lowest": 0, "highest": 10, "text": "{lowest} to {highest}"},
    "general": "All of {dimensions} ({count}).",
    "dimension": "{dimension}:{description} {scale} -> {score}",
}


def test_styles_of_the_package():
    assert built_in_styles() == ["published_system", "published_user", "question_first", "released"]
    content = [dict(PromptStyle.load(name).content) for name in built_in_styles()]
    for each in content:
        each.pop("style"), each.pop("placement")
    assert all(each == content[0] for each in content)


def test_published_prompts_stand_alone_in_the_system_turn():
    general, *each = PromptStyle.load("published_system").conversations(USER, DIMENSIONS, (5, 4, 2.5))
    assert [turn["role"] for turn in general] == ["system", "user"]
    assert "helpfulness, instruction following and zest" in general[0]["content"]
    for conversation, name, score in zip(
        each, ("helpfulness", "instruction following", "zest"), ("5", "4", "2.5"), strict=True
    ):
        assert conversation[1:] == USER
        text = conversation[0]["content"]
        assert f"score of {score} out of 5 for {name}" in text
        assert all(f"\n{level}: " in text for level in range(1, 6))
        assert "judged on" not in text  # the general prompt's words


def test_the_user_placement_goes_in_front_of_the_last_user_turn():
    turns = [*USER, {"role": "assistant", "content": "Scattering."}, {"role": "user", "content": "And red?"}]
    for conversation in PromptStyle.load("published_user").conversations(turns, DIMENSIONS, (5, 4, 3)):
        assert conversation[:2] == turns[:2]
        assert conversation[2]["content"].endswith("\n\nAnd red?")


def test_question_first_goes_behind_the_last_user_turn():
    turns = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": "Scattering."},
        {"role": "user", "content": "And red?"},
    ]
    style = PromptStyle.load("question_first")
    assert style.question_first
    assert not PromptStyle.load("published_user").question_first
    texts = style.texts(DIMENSIONS, (5, 4, 3))
    for conversation, text in zip(style.conversations(turns, DIMENSIONS, (5, 4, 3)), texts, strict=True):
        assert conversation[:3] == turns[:3]
        assert conversation[3] == {"role": "user", "content": f"And red?\n\n{text}"}


def test_a_system_turn_of_the_record_is_kept_below_ours():
    turns = [{"role": "system", "content": "Be brief."}, *USER]
    for conversation in PromptStyle.load("published_system").conversations(turns, DIMENSIONS, (5, 4, 3)):
        assert [turn["role"] for turn in conversation] == ["system", "user"]
        assert conversation[0]["content"].endswith("\n\nBe brief.")


def test_the_released_style_nests():
    alone = PromptStyle.load("published_user").texts(DIMENSIONS, (5, 4, 3))
    nested = PromptStyle.load("released").texts(DIMENSIONS, (5, 4, 3))
    for d in range(4):
        assert nested[d] == "\n\n".join(reversed(alone[: d + 1]))
    last = PromptStyle.load("released").conversations(USER, DIMENSIONS, (5, 4, 3))[3]
    assert last == [{"role": "user", "content": nested[3] + "\n\nWhy is the sky blue?"}]


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "style: published\nplacement: user\nscale: {lowest: 0, highest: 10, text: 'From {lowest} to {highest}.'}\n"
        "general: 'Mind {dimensions}.'\ndimension: 'Mind {dimension}.{description} {scale} Aim at {score}/{highest}.'\n"
        "descriptions: {zest: 'It asks for {life}.'}\n"
    )
    style = PromptStyle.load(path)
    assert style.scale == (0.0, 10.0)
    assert style.texts(["zest"], [7]) == (
        "Mind zest.",
        "Mind zest. It asks for {life}. From 0 to 10. Aim at 7/10.",
    )
    assert PromptStyle.from_content(style.content) == style


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"style": "nested"}, "style is published or released"),
        ({"placement": "assistant"}, "placement is system, user, user_end, not 'assistant'"),
        ({"scale": {"lowest": 5, "highest": 1, "text": ""}}, "scale.lowest must be below"),
        ({"scale": {"lowest": 1, "text": ""}}, "'highest' is missing"),
        ({"general": "All of {names}"}, "general uses {names}"),
        ({"general": "All of {dimensions.__class__}"}, "general uses"),
        ({"dimension": "no score for {dimension}"}, "must use {dimension} and {score}"),
        ({"dimension": "{dimension {score}"}, "dimension"),
        ({"dimension": 3}, "dimension must be text"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_a_wrong_field_is_named(change, says):
    with pytest.raises(ConfigError, match=r"^prompts: ") as error:
        PromptStyle.from_content({**MINIMAL, **change})
    assert says in str(error.value)


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match="'general' is missing"):
        PromptStyle.from_content({name: value for name, value in MINIMAL.items() if name != "general"})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", ""])
def test_a_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--prompts .*prompts\.yaml"):
        PromptStyle.load(path)


def test_a_missing_file_says_what_there_is():
    with pytest.raises(ConfigError, match="published_system, published_user, question_first, released"):
        PromptStyle.load("publishd")


def test_scores_are_written_short():
    assert [format_score(score) for score in (4.0, 2.5, 2.6666667, 10.0, 0.0)] == ["4", "2.5", "2.67", "10", "0"]
