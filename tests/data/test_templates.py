"""Conversations through templates of the public kinds: each response byte for byte, learnt once."""

from __future__ import annotations

import functools
import json
from collections import Counter

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from public_templates import FAMILIES, public_tokenizer

from dskd_lightning.data.chat import ChatRenderer, Learn
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.data.formats import InvalidRecord, parse_record
from dskd_lightning.data.rendering import _as_models_read
from dskd_lightning.errors import UserError

CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
THINKING = """{% for m in messages %}{% if m.role == 'assistant' %}{% set r = '' %}{% set c = m.content %}\
{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}\
{% set c = c.split('</think>')[-1].strip() %}{% endif %}<|assistant|>\n\
{% if loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}\
{% for t in m.tool_calls or [] %}\n<tool>{{ t.function.name }}{{ t.function.arguments | tojson }}</tool>\
{% endfor %}<|end|>\n{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"""
REASONING_DROPPED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] | trim }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
)
SYSTEMLESS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content | trim }} "
    "{% elif m.role == 'tool' %}TOOL: {{ m.content | tojson }} "
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
)
TEMPLATES = {
    "chatml": CHATML,
    "thinking": THINKING,
    "reasoning dropped": REASONING_DROPPED,
    "systemless": SYSTEMLESS,
    "refusing": REFUSING,
}

TOOLS = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}])
_TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")),
        st.sampled_from("\ue000\ue001\ue0020123 \n<>{}"),
    ),
    min_size=1,
    max_size=12,
)
_WORDS = st.one_of(_TEXT, st.sampled_from(["a <|end|> b", "<|user|>", "\ue0000c\ue000", "{{ x }}", "🙂é"]))
_SAID = _WORDS.filter(lambda text: text.strip() and "think>" not in text)


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    messages = [Message("system", draw(_SAID))] if draw(st.booleans()) else []
    tools = draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(_SAID)))
        if tools and draw(st.booleans()):
            call = {"id": "call12345", "function": {"name": "look", "arguments": {"for": draw(_SAID)}}}
            messages.append(Message("assistant", "", extra=json.dumps({"tool_calls": [call]})))
            messages.append(Message("tool", draw(_SAID), extra=json.dumps({"tool_call_id": "call12345"})))
        thought = f"<think>\n{draw(_SAID)}\n</think>\n\n" if draw(st.booleans()) else ""
        messages.append(Message("assistant", thought + draw(_SAID), learnt=draw(st.booleans())))
    messages[-1] = Message("assistant", messages[-1].content)
    return Example(tuple(messages), (messages[-1].content,), "f", 1, TOOLS if tools else "")


def _asked(answer: str) -> Example:
    return Example((Message("user", "a"), Message("assistant", answer)), (answer,), "f", 1)


def _instructed(system: str, question: str) -> Example:
    return Example(
        (Message("system", system), Message("user", question), Message("assistant", "yes")), ("yes",), "f", 1
    )


@functools.cache
def renderer(name: str, learn: Learn = "assistant") -> ChatRenderer:
    if name in FAMILIES:
        return ChatRenderer(public_tokenizer(name), learn=learn)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    return ChatRenderer(tokenizer, learn=learn)


def end_of(name: str, model: ChatRenderer) -> int:
    return model.tokenizer.convert_tokens_to_ids(FAMILIES[name][1] if name in FAMILIES else "<|end|>")


@pytest.mark.parametrize(("system", "question"), [("be", "to be"), ("INST", "why?"), ("0", "1"), ("c", "d")])
def test_a_system_message_is_not_lost_because_its_text_stands_elsewhere(system: str, question: str) -> None:
    """Mistral's template takes none."""
    model = renderer("mistral")
    (turn,) = model.render(_instructed(system, question)).turns
    assert f"{system}\n\n{question}[/INST]" in model.tokenizer.decode(turn.prompt_ids)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversations(), st.sampled_from(sorted([*TEMPLATES, *FAMILIES])))
@example(_asked("<think>\nhm\n</think>\n\n b"), "deepseek")
@example(_instructed("0", "1"), "mistral")
def test_every_response_is_found_byte_for_byte_and_learnt_once(example: Example, name: str) -> None:
    student, teacher = renderer(name), renderer("chatml")
    if name == "gemma" and any(message.role == "tool" for message in example.messages):
        with pytest.raises(UserError, match=r"refuses the conversation at f:1 .*alternate"):
            student.render(_as_models_read(example, [student, teacher], Counter()))
        return
    example = _as_models_read(example, [student, teacher], Counter())
    learnt = [m.content.strip() for m in example.messages if m.role == "assistant" and m.learnt]
    for model, end in ((student, end_of(name, student)), (teacher, end_of("chatml", teacher))):
        turns = model.render(example).turns
        decoded = [model.tokenizer.decode(turn.response_ids[:-1]) for turn in turns]
        assert decoded == learnt
        assert [turn.response_ids[-1] for turn in turns] == [end] * len(turns)
        assert [turn.spans.length for turn in turns] == [len(text.encode()) for text in learnt]
        assert not any(np.any(turn.spans.unknown) for turn in turns)
        whole = model.tokenizer.decode([i for t in turns for i in (*t.prompt_ids, *t.response_ids)])
        for message in example.messages:
            said = message.content.strip()
            assert said in whole or json.dumps(said, ensure_ascii=False)[1:-1] in whole
        prompt = model.generation_prompt(
            example.prompt,
            tools=example.tools,
            reasoning=example.messages[-1].content.startswith("<think>") or None,
        )
        past = [i for t in turns[:-1] for i in (*t.prompt_ids, *t.response_ids)]
        assert prompt == past + turns[-1].prompt_ids


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversations(), st.sampled_from(sorted(TEMPLATES)), st.sampled_from(["last", "everything"]))
def test_what_is_learnt_is_a_setting(example: Example, name: str, learn: Learn) -> None:
    student, teacher = renderer(name, learn), renderer("chatml", learn)
    example = _as_models_read(example, [student, teacher], Counter())
    expected = [m.content.strip() for m in example.messages if m.learnt]
    if learn == "last":
        expected = expected[-1:]
    for model in (student, teacher):
        turns = model.render(example).turns
        said = [turn.response_ids[: int((~turn.spans.end).sum())] for turn in turns]
        assert [model.tokenizer.decode(ids) for ids in said] == expected
        assert [len(turn.spans) for turn in turns] == [len(turn.response_ids) for turn in turns]
        whole = [i for t in turns for i in (*t.prompt_ids, *t.response_ids)]
        reasons = example.messages[-1].content.startswith("<think>") or None
        prompt = model.generation_prompt(example.prompt, tools=example.tools, reasoning=reasons)
        assert whole == prompt + turns[-1].response_ids


def text_of(template: str, *messages: Message, tools: str = "", **options: object) -> tuple[str, str]:
    """The whole text and what is learnt of it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    turns = ChatRenderer(tokenizer, **options).render(Example(messages, tools=tools)).turns
    whole = tokenizer.decode([i for t in turns for i in (*t.prompt_ids, *t.response_ids)])
    return whole, tokenizer.decode([i for t in turns for i in t.response_ids])


def test_reasoning_stands_where_the_template_puts_it() -> None:
    answer = "<think>\nadd them\n</think>\n\n4"
    whole, learnt = text_of(THINKING, Message("user", "2+2?"), Message("assistant", answer))
    assert whole == f"<|user|>\n2+2?<|end|>\n<|assistant|>\n{answer}<|end|>"
    assert learnt == f"{answer}<|end|>"
    empty = "<think>\n\n</think>\n\n4"
    assert text_of(THINKING, Message("user", "x"), Message("assistant", empty))[0].count("<think>") == 1
    whole, learnt = text_of(THINKING, Message("user", "x"), Message("assistant", "4"))
    assert whole.endswith(f"<|assistant|>\n<think>\n\n</think>\n\n{learnt}")


@pytest.mark.parametrize("space", ["", "\n\n", "\n\n ", "  "])
def test_the_space_behind_reasoning_is_the_responses_where_a_template_drops_what_is_before(space) -> None:
    model = renderer("deepseek")
    (turn,) = model.render(_asked(f"<think>\nhm\n</think>{space}b")).turns
    assert model.tokenizer.decode(turn.prompt_ids).endswith("Assistant\uff5c>")
    assert model.tokenizer.decode(turn.response_ids[:-1]) == f"<think>\nhm\n</think>{space}b"


@pytest.mark.parametrize("opening", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_reasoning_is_not_doubled_behind_a_template_that_opens_it(opening: str) -> None:
    template = REASONING_DROPPED.replace("<|assistant|>", "<|assistant|>" + opening)
    answer = "<think>\nadd them\n</think>\n\n4"
    whole, _ = text_of(template, Message("user", "2+2?"), Message("assistant", answer))
    assert whole == f"<|user|>2+2?<|assistant|>{answer}<|end|>"


def test_reasoning_of_earlier_answers_goes_where_a_template_drops_it() -> None:
    said = [Message("user", "a"), Message("assistant", "<think>\nt\n</think>\n\nb")] * 2
    counts = Counter[str]()
    kept = _as_models_read(Example(tuple(said)), [renderer("chatml"), renderer("thinking")], counts)
    assert (kept.messages[1], kept.messages[3]) == (Message("assistant", "b", learnt=False), said[3])
    assert counts["examples without the reasoning of earlier answers"] == 1
    assert _as_models_read(Example(tuple(said)), [renderer("chatml")], counts).messages == tuple(said)


def test_a_message_of_weight_0_is_read_and_not_learnt() -> None:
    user = {"role": "user", "content": "a"}
    turns = [user, {"role": "assistant", "content": "WRONG", "weight": 0}, user]
    record = {"messages": [*turns, {"role": "assistant", "content": "right", "weight": 1}]}
    whole, learnt = text_of(CHAT_TEMPLATE, *parse_record(record, "messages", "f", 1).messages)
    assert "WRONG<|end|>" in whole
    assert learnt == "right<|end|>"
    with pytest.raises(InvalidRecord, match="every weight is 0"):
        parse_record({"messages": turns[:2]}, "messages", "f", 1)
    with pytest.raises(InvalidRecord, match=r"weight 0\.5"):
        parse_record({"messages": [user, {**turns[1], "weight": 0.5}]}, "messages", "f", 1)


def test_tools_are_the_templates_and_their_results_are_not_learnt() -> None:
    template = "{% for t in tools or [] %}TOOL {{ t.function.name }} {% endfor %}" + THINKING
    call = {"function": {"name": "weather", "arguments": '{"city": "Pau"}'}}
    record = {
        "tools": json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}]),
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "I look.", "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Fine.", "reasoning_content": "no cloud"},
        ],
    }
    example = parse_record(record, "messages", "f", 1)
    whole, learnt = text_of(template, *example.messages, tools=example.tools)
    assert whole.startswith("TOOL weather ")
    assert "sunny" in whole
    calls = 'I look.<tool>weather{"city": "Pau"}</tool><|end|>'
    assert learnt == calls + "<think>\nno cloud\n</think>\n\nFine.<|end|>"
    _, learnt = text_of(CHATML, *example.messages, tools=example.tools)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Pau"}}\n</tool_call>' in learnt
    record["messages"][1] = {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'}
    assert "weather" in parse_record(record, "messages", "f", 1).messages[1].extra


def test_everything_is_every_message_and_not_the_template() -> None:
    said = (Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "yo"))
    whole, learnt = text_of(CHATML, *said, learn="everything")
    assert whole == text_of(CHATML, *said)[0]
    assert learnt == "Be brief.<|end|>hi<|end|>yo<|end|>"
    _, learnt = text_of(SYSTEMLESS, *said, learn="everything")
    assert learnt == "Be brief.hiyo<|end|>"  # nothing closes what the user says
    moved = "{% for m in messages | reverse %}{{ m.content }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match=r"or moves one: .* or set `learn: assistant`"):
        text_of(moved, *said, learn="everything")


def test_a_lost_system_message_goes_to_the_user() -> None:
    whole, _ = text_of(
        SYSTEMLESS, Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "yo")
    )
    assert whole == "<|bos|>USER: Be brief.\n\nhi ASSISTANT: yo<|end|>"


def test_an_end_of_turn_need_not_be_special() -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    tokenizer.chat_template = CHATML.replace("<|end|>", "<|im_end|>")
    messages = [
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
    ]
    turns = ChatRenderer(tokenizer).render(Example(tuple(messages))).turns
    assert [tokenizer.decode(turn.response_ids) for turn in turns] == ["b<|im_end|>", "d<|im_end|>"]


def test_special_strings_of_users_are_text_unless_wanted() -> None:
    messages = (Message("user", "say <|end|> now"), Message("assistant", "<|end|>!"))
    tokenizer = make_tokenizer()
    for wanted in (False, True):
        (turn,) = ChatRenderer(tokenizer, special_tokens_in_text=wanted).render(Example(messages)).turns
        assert turn.prompt_ids.count(tokenizer.eos_token_id) == 1 + wanted
        assert turn.response_ids.count(tokenizer.eos_token_id) == 1 + wanted
        assert "say <|end|> now<|end|>" in tokenizer.decode(turn.prompt_ids)


def test_template_options_reach_the_template_and_the_fingerprint() -> None:
    template = "{{ mood }} " + CHAT_TEMPLATE
    messages = Message("user", "x"), Message("assistant", "y")
    assert text_of(template, *messages, template_options={"mood": "gay"})[0].startswith("gay ")
    tokenizer = make_tokenizer()
    plain, other = ChatRenderer(tokenizer), ChatRenderer(tokenizer, template_options={"mood": "gay"})
    assert plain.fingerprint != other.fingerprint


def test_the_date_of_a_template_is_fixed() -> None:
    whole, _ = text_of(
        "{{ strftime_now('%Y-%m-%d') }} " + CHAT_TEMPLATE, Message("user", "x"), Message("assistant", "y")
    )
    assert whole.startswith("2024-07-26 ")


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ messages[0].content + 1 }}", {"rag": CHATML}])
def test_templates_raise_anything(template: object) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    example = Example((Message("user", "x"), Message("assistant", "y")), (), "f", 1)
    renderer = ChatRenderer(tokenizer)
    with pytest.raises(UserError, match="refuses the conversation at f:1"):
        renderer.render(example)


@pytest.mark.parametrize("text", ["question", "e"])  # which the template itself writes
@pytest.mark.parametrize("left_out", ["user", "tool"])
def test_a_template_that_leaves_out_a_message_is_refused(left_out: str, text: str) -> None:
    template = CHAT_TEMPLATE.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != '" + left_out + "' %}"
    )
    said = [Message("user", text), Message("tool", text), Message("assistant", "yes")]
    with pytest.raises(UserError, match=f"leaves out a {left_out} message"):
        text_of(template, *said)


def test_a_template_may_refuse_other_texts_than_the_conversations() -> None:
    template = "{% if messages[0].content | length < 5 %}{{ 1 // 0 }}{% endif %}" + CHAT_TEMPLATE
    whole, _ = text_of(template, Message("user", "long enough"), Message("assistant", "y"))
    assert "long enough" in whole


def test_a_message_may_stand_within_json() -> None:
    template = CHAT_TEMPLATE.replace(
        "m['content']", "(m.content | tojson if m.role == 'tool' else m.content)"
    )
    said = [Message("user", "x"), Message("tool", 'a "quoted"\nline'), Message("assistant", "y")]
    whole, _ = text_of(template, *said)
    assert '"a \\"quoted\\"\\nline"' in whole
