"""Examples rendered together: the same tokens as each alone, tokenised in one thread."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.chunks import chunked, render_chunk
from dskd_lightning.data.examples import Example, InvalidRecord, Message
from dskd_lightning.data.rendering import PreparationSettings, render_examples
from dskd_lightning.tokenizers import encoded

PLAIN = "Q: {system}{prompt}\nA: "
RENDERERS = [
    ChatRenderer(make_tokenizer("bpe")),
    ChatRenderer(make_tokenizer("sentencepiece", add_bos=True, chat=False), PLAIN),
]
EVERYTHING = [ChatRenderer(make_tokenizer("bpe"), learn="everything")] * 2
SETTINGS = PreparationSettings(max_length=60, max_prompt_length=30)


def asked(*turns: str, line: int = 1) -> Example:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))  # type: ignore[arg-type]
    return Example(messages, (turns[-1],), "data.jsonl", line)


SPECIAL = RENDERERS[0].tokenizer.eos_token
EXAMPLES = [
    asked("one", " first "),
    Example((Message("assistant", "a document " * 12),)),
    asked(f"what is {SPECIAL}?", f"it is {SPECIAL} here", "and é?", "é🙂 " * 3),
    asked("too long " * 20, "cut " * 30),
    asked("last", "end"),
]


def listed(
    rendered: list[tuple[int, Example, list[dict[str, Any]]]],
) -> list[tuple[int, Example, list[dict[str, list[int]]]]]:
    return [
        (number, piece, [{name: np.asarray(value).tolist() for name, value in row.items()} for row in rows])
        for number, piece, rows in rendered
    ]


def test_together_is_as_each_alone() -> None:
    counts, alone = Counter[str](), Counter[str]()
    together = list(render_examples(EXAMPLES, RENDERERS, SETTINGS, counts))
    each = [
        (number, piece, rows)
        for number, example in enumerate(EXAMPLES)
        for _, piece, rows in render_examples([example], RENDERERS, SETTINGS, alone)
    ]
    assert listed(together) == listed(each)
    assert counts == alone
    assert len({number for number, _, _ in together}) == len(EXAMPLES)
    assert sum(number == 1 for number, _, _ in together) > 1  # windows of the document


def test_texts_of_users_never_become_special_tokens() -> None:
    special = RENDERERS[0].tokenizer.eos_token_id
    roomy = PreparationSettings(max_length=500, max_prompt_length=200)
    (written,) = (r for n, _, r in render_examples(EXAMPLES, RENDERERS, roomy, Counter()) if n == 2)
    turns = RENDERERS[0].render(asked("what is it?", "it is here", "and é?", "é🙂 " * 3)).turns
    own = sum((*turn.prompt_ids, *turn.response_ids).count(special) for turn in turns)
    assert written[0]["tokens"].count(special) == own > 0


def test_the_first_invalid_example_is_told_or_skipped() -> None:
    tokenizer = make_tokenizer("bpe")
    tokenizer.chat_template = (
        "{{ raise_exception('no') if messages[0].content == 'bad' }}"
        "{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    refusing = ChatRenderer(tokenizer)
    examples = [asked("good", "x"), asked("bad", "y", line=2), asked("bad", "z", line=3), asked("ok", "v")]
    with pytest.raises(InvalidRecord, match=r"data\.jsonl:2"):
        list(render_examples(examples, [refusing], SETTINGS, Counter()))
    counts = Counter[str]()
    skipping = PreparationSettings(max_length=60, max_prompt_length=30, skip_invalid=True)
    found = list(render_examples(examples, [refusing], skipping, counts))
    assert [number for number, _, _ in found] == [0, 3]
    assert counts["skipped: refused by the chat template"] == 2


@pytest.mark.parametrize("chosen", [None, "true", "false"])
def test_batches_are_tokenised_without_threads_unless_chosen(monkeypatch, chosen: str | None) -> None:
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(name, chosen)
    seen = []

    class Backend:
        def encode_batch_fast(self, texts, add_special_tokens):
            seen.append(os.environ.get(name))
            raise KeyError

    with pytest.raises(KeyError):
        encoded(Backend(), ["a"], threads=False)
    assert seen == [chosen or "false"]
    assert os.environ.get(name) == chosen


def test_rendering_asks_for_no_threads(monkeypatch) -> None:
    asked_for = []

    def spy(backend, texts, *, threads=True):
        asked_for.append(threads)
        return encoded(backend, texts, threads=threads)

    monkeypatch.setattr("dskd_lightning.data.chat.encoded", spy)
    list(render_examples(EXAMPLES, RENDERERS, SETTINGS, Counter()))
    assert asked_for
    assert not any(asked_for)


def test_the_garbage_collector_goes_on_behind_a_chunk() -> None:
    chunk = [EXAMPLES[0]]
    seen: list[bool] = []

    def watched() -> Iterator[Example]:
        seen.append(gc.isenabled())
        yield from chunk

    assert list(chunked(watched())) == [chunk]
    assert seen == [False]
    assert gc.isenabled()
    with pytest.raises(InvalidRecord):
        render_chunk([replace(EXAMPLES[0], teacher_messages=EXAMPLES[0].messages)], EVERYTHING, SETTINGS)
    assert gc.isenabled()
    gc.disable()
    try:
        render_chunk(chunk, RENDERERS, SETTINGS)
        assert not gc.isenabled()
    finally:
        gc.enable()
