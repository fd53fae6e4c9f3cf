"""A chat template that offers the prompts of training, for whoever uses the exported model.

Takes a template's Jinja text and the prompts that the model was aligned under; gives the template with a head that
reads one more variable:

    tokenizer.apply_chat_template(messages, want="general", …)
    tokenizer.apply_chat_template(messages, want={"correctness": 5}, …)

and puts the prompt where training put it. Without `want` the template renders what it rendered before. The head only
replaces `messages`; what follows it is the original text, and is found again when a model is trained and exported a
second time. Whether all that holds for a template is tried out before it is given away.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_amopo.data.chat_template import ChatTemplate, TemplateRefusal
from megatron_amopo.data.groups import GENERAL
from megatron_amopo.data.model_prompts import ModelPrompts
from megatron_amopo.data.prompts import Message
from megatron_amopo.errors import DataError

_BEGIN = "{#- megatron-amopo: prompts of the training data, by want="
_END = "{#- megatron-amopo: end #}\n"
_HEAD = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
_SCORE = "\ufdd1"  # a Unicode noncharacter: no prompt holds it
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_QUESTION: Message = {"role": "user", "content": "Why?"}
_PROBES: tuple[tuple[Message, ...], ...] = (
    (_QUESTION,),
    ({"role": "system", "content": "Be brief."}, _QUESTION),
    (_QUESTION, {"role": "assistant", "content": "Because."}, {"role": "user", "content": " And then? \n"}),
)


class NotExtended(Exception):
    """The template can't be extended; the message says why."""


def extended_template(source: str, prompts: ModelPrompts) -> str:
    """The template with a head for `prompts`, in place of one that it may have. Raises NotExtended."""
    original = original_template(source)
    try:
        before = ChatTemplate(original, _SPECIAL)
    except DataError as error:
        raise NotExtended("it is not valid Jinja") from error
    if "want" in before.variables:
        raise NotExtended("it has a variable 'want' of its own")
    text = _head(prompts) + original
    _try_out(before, ChatTemplate(text, _SPECIAL), prompts)
    return text


def original_template(source: str) -> str:
    """The template without the head that `extended_template` put in front."""
    return _HEAD.sub("", source, count=1) if source.startswith(_BEGIN) else source


def _try_out(before: ChatTemplate, after: ChatTemplate, prompts: ModelPrompts) -> None:
    """Compare the extended template with the original on conversations that carry the prompt already."""
    offers = False
    for messages, generation_prompt in itertools.product(_PROBES, (True, False)):
        for want in (None, *_probe_wants(prompts)):
            if want is None:
                expected = _rendering(before, messages, generation_prompt)
                found = _rendering(after, messages, generation_prompt)
            else:
                expected = _rendering(before, prompts.conversation(messages, want), generation_prompt)
                found = _rendering(after, messages, generation_prompt, want=want or GENERAL)
                wanted = prompts.style.wanted_text(prompts.dimensions, want).strip()
                offers |= expected is not None and wanted in expected
            if found != expected:
                turns = ", ".join(message["role"] for message in messages)
                raise NotExtended(f"with the prompts in front it renders the turns {turns} in another way")
    if not offers:
        raise NotExtended("it fails on the prompts, or leaves them out")


def _probe_wants(prompts: ModelPrompts) -> Iterator[dict[str, float]]:
    low, high = prompts.style.scale
    if GENERAL in prompts.trained:
        yield {}
    for name, score in itertools.product(prompts.offered, (low, high, low + (high - low) * 0.375)):
        yield {name: score}
    if len(prompts.offered) > 1:
        yield dict.fromkeys(prompts.offered, high)


def _rendering(
    template: ChatTemplate, messages: Sequence[Message], generation_prompt: bool, **variables: Any
) -> str | None:
    try:
        return template.render(list(messages), generation_prompt=generation_prompt, **variables)
    except TemplateRefusal:
        return None


def _head(prompts: ModelPrompts) -> str:
    """The Jinja text in front of the original. Each line strips the white space around it, so that it renders to
    nothing, and the last one ends in a newline that every engine of chat templates trims.
    """
    style = prompts.style
    pieces = {name: style.dimension_text(name, _SCORE).split(_SCORE) for name in prompts.offered}
    low, high = style.scale
    offered = ", ".join(prompts.offered)
    text = "(amopo_pieces[name] | join(('%.2f' | format(want[name])).rstrip('0').rstrip('.')))"
    nests = style.style == "released"
    lines = [
        f'{_BEGIN}"general" or want={{"dimension": score}}. -#}}',
        "{%- if want is defined and want is not none -%}",
        f"{{%- set amopo_general = {_literal(style.general_text(prompts.dimensions))} -%}}",
        f"{{%- set amopo_pieces = {_literal(pieces)} -%}}",
        "{%- set amopo = namespace(texts=[], last=-1) -%}",
        "{%- if want is mapping and want -%}",
        "{%- for name in want -%}",
        "{%- if name not in amopo_pieces -%}",
        f"{{{{- raise_exception('want: no dimension ' ~ name ~ ' among those trained: ' ~ {_literal(offered)}) -}}}}",
        "{%- endif -%}",
        f"{{%- if want[name] is not number or not ({low!r} <= want[name] <= {high!r}) -%}}",
        f"{{{{- raise_exception('want: the score of ' ~ name ~ ' is a number from {low:g} to {high:g}') -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- for name in amopo_pieces -%}",
        "{%- if name in want -%}",
        f"{{%- set amopo.texts = {f'[{text}] + amopo.texts' if nests else f'amopo.texts + [{text}]'} -%}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        *_with_general(nests),
        "{%- elif want == 'general' -%}",
        "{%- set amopo.texts = [amopo_general] -%}"
        if GENERAL in prompts.trained
        else "{{- raise_exception('want: the model was not trained under the general prompt') -}}",
        "{%- else -%}",
        '{{- raise_exception(\'want is "general" or scores by dimension, such as {"NAME": 5}\') -}}',
        "{%- endif -%}",
        "{%- set amopo_text = amopo.texts | join('\\n\\n') -%}",
        *_placement(style.placement),
        "{%- endif -%}",
    ]
    return "\n".join(lines) + "\n" + _END


def _with_general(nests: bool) -> list[str]:
    """Add the general prompt as `PromptStyle.wanted_text` does."""
    if nests:
        return ["{%- set amopo.texts = amopo.texts + [amopo_general] -%}"]
    return [
        "{%- if amopo.texts | length > 1 -%}",
        "{%- set amopo.texts = [amopo_general] + amopo.texts -%}",
        "{%- endif -%}",
    ]


def _placement(placement: str) -> list[str]:
    """Put `amopo_text` into `messages`, as `PromptStyle.place` does; in a conversation that goes on after the last
    user turn, into that turn."""
    if placement == "system":
        return [
            "{%- if messages[0]['role'] == 'system' -%}",
            *_refuse_parts("messages[0]['content']"),
            "{%- set messages = [{'role': 'system', 'content': amopo_text ~ '\\n\\n' ~ messages[0]['content']}]"
            " + messages[1:] -%}",
            "{%- else -%}",
            "{%- set messages = [{'role': 'system', 'content': amopo_text}] + messages -%}",
            "{%- endif -%}",
        ]
    content = "messages[amopo.last]['content']"
    parts = [content, "amopo_text"] if placement == "user_end" else ["amopo_text", content]
    return [
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'user' -%}{%- set amopo.last = loop.index0 -%}{%- endif -%}",
        "{%- endfor -%}",
        "{%- if amopo.last < 0 -%}{{- raise_exception('want: the conversation has no user turn') -}}{%- endif -%}",
        *_refuse_parts(content),
        f"{{%- set amopo_turn = {{'role': 'user', 'content': {parts[0]} ~ '\\n\\n' ~ {parts[1]}}} -%}}",
        "{%- set messages = messages[:amopo.last] + [amopo_turn] + messages[amopo.last + 1:] -%}",
    ]


def _refuse_parts(content: str) -> list[str]:
    """The prompt can't be joined to a list of content parts, which Jinja would write as Python shows it."""
    return [
        f"{{%- if {content} is not string -%}}",
        "{{- raise_exception('want: the turn that takes the prompt has to be text, not a list of parts') -}}",
        "{%- endif -%}",
    ]


def _literal(value: str | Mapping[str, Sequence[str]]) -> str:
    """A value as Jinja writes it, which is as JSON does with characters unescaped."""
    return json.dumps(value, ensure_ascii=False)
