from __future__ import annotations

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer

from dskd_lightning.alignment.exact import align
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.data.prepared import conversation_row, rendered_example
from dskd_lightning.data.truncation import truncate
from dskd_lightning.errors import UserError

USER, REPLY = "Name three fruits.", "apples, pears — naïve 🙂 and plums!"


def conversation(*turns: str, system: str | None = None) -> Example:
    roles = ["user", "assistant"] * len(turns)
    messages = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
    return Example(messages, (turns[-1],), "f", 1).with_system(system)


def rendered(renderer: ChatRenderer, example: Example):
    row = conversation_row(renderer.render(example))
    arrays = {
        k: np.array(v, np.uint8 if k == "flags" else np.int32) for k, v in row.items() if k != "normalized"
    }
    return rendered_example({**arrays, "normalized": row["normalized"]})


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "unigram"])
def test_loss_on_every_assistant_turn_and_its_end(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    example = rendered(
        ChatRenderer(tokenizer), conversation(USER, "apples", "More?", " plums!\n", system="Be brief.")
    )
    labels = example.labels[example.response]
    ends = np.flatnonzero(labels == tokenizer.eos_token_id)
    assert len(ends) == 2
    assert tokenizer.decode(labels[: ends[0]]).strip() == "apples"
    assert tokenizer.decode(labels[ends[0] + 1 : ends[1]]).strip() == "plums!"
    assert ends[1] == len(labels) - 1
    shifted = example.input_ids[1:]
    kept = example.labels[:-1] != -100
    assert (shifted[kept] == example.labels[:-1][kept]).all()


def test_tokens_are_those_of_the_template() -> None:
    tokenizer = make_tokenizer()
    example = conversation(USER, REPLY)
    tokens = rendered(ChatRenderer(tokenizer), example)
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("<|end|>\n")
    assert tokenizer.decode(tokens.input_ids) == whole
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert ChatRenderer(tokenizer).generation_prompt(example.prompt) == list(prompt)
    assert tokens.response[0] == len(prompt) - 1


def test_trimming_template_special_end_and_thinking() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' %} <t></t>{% endif %}"
        "{{ m.content | trim }} <|pad|>{% endfor %}"
    )
    example = rendered(ChatRenderer(tokenizer), conversation(USER, "apples ", "x", "plums"))
    labels = example.labels[example.response]
    assert tokenizer.decode(labels) == "apples<|pad|>plums<|pad|>"
    assert list(example.input_ids).count(tokenizer.bos_token_id) == 1


def test_prompt_template_adds_bos_once_and_eos() -> None:
    renderer = ChatRenderer(
        make_tokenizer("sentencepiece", add_bos=True, chat=False), "{system}|Q {prompt} A: "
    )
    example = rendered(renderer, conversation(USER, "apples", "and", "plums"))
    tokenizer = renderer.tokenizer
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert list(example.input_ids).count(tokenizer.bos_token_id) == 1
    assert (example.labels == tokenizer.eos_token_id).sum() == 2


def test_system_goes_to_the_user_where_a_template_refuses_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    )
    renderer = ChatRenderer(tokenizer)
    prompt = renderer.generation_prompt(conversation(USER, "x", system="Be brief.").prompt)
    assert tokenizer.decode(prompt) == f"<|user|>\nBe brief.\n\n{USER}<|end|>\n<|assistant|>\n"


def test_template_errors() -> None:
    tokenizer = make_tokenizer(chat=False)
    with pytest.raises(UserError, match="prompt_template"):
        ChatRenderer(tokenizer).render(conversation(USER, "x"))
    with pytest.raises(UserError, match=r"no \{prompt\}"):
        ChatRenderer(tokenizer, "hello")
    with pytest.raises(UserError, match="format string"):
        ChatRenderer(tokenizer, "{prompt} {other}")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"f:1 \(roles must alternate\)"):
        ChatRenderer(tokenizer).render(conversation(USER, "x"))
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="leaves out an assistant turn"):
        ChatRenderer(tokenizer).render(conversation(USER, "x"))


def test_fingerprint_follows_tokens_and_template() -> None:
    tokenizer = make_tokenizer()
    assert ChatRenderer(tokenizer).fingerprint == ChatRenderer(make_tokenizer()).fingerprint
    assert ChatRenderer(tokenizer).fingerprint != ChatRenderer(tokenizer, "{prompt}").fingerprint
    assert ChatRenderer(tokenizer).fingerprint != ChatRenderer(make_tokenizer(vocab_size=420)).fingerprint


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "wordpiece"])
def test_truncation_keeps_the_same_text_on_both_sides(kind: str) -> None:
    left = ChatRenderer(make_tokenizer("bpe"))
    right = ChatRenderer(make_tokenizer(kind, add_bos=True, chat=False), "{prompt}\n")
    example = conversation(USER, f"{REPLY} {REPLY}", "again", "plums")
    full = [renderer.render(example) for renderer in (left, right)]
    sizes = set()
    for limit in range(4, 150):
        cut = truncate(full, limit + 12, 12, [left.bos_ids, right.bos_ids])
        if not cut.conversations:
            assert cut.response
            continue
        one, two = cut.conversations
        assert len(one.turns) == len(two.turns)
        for side in (one, two):
            assert sum(len(t.prompt_ids) + len(t.response_ids) for t in side.turns) <= limit + 12
            assert len(side.turns[0].prompt_ids) <= 12
            assert all(len(t.response_ids) == len(t.spans) for t in side.turns)
        for a, b in zip(one.turns, two.turns, strict=True):
            assert a.spans.length == b.spans.length
            pairs = align(a.spans, b.spans)
            assert pairs.groups > 0
            assert bool(a.spans.end.any()) == bool(b.spans.end.any())
        assert two.turns[0].prompt_ids[0] == right.tokenizer.bos_token_id
        sizes.add((len(one.turns), one.turns[-1].spans.length))
    assert len(sizes) > 5
    assert not cut.response
    assert cut.prompt
