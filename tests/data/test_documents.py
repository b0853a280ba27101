"""Documents are learnt whole, in windows that hold the same text for every model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dskd_lightning.alignment.exact import align
from dskd_lightning.data import DistillationCollator, InstructionDataModule
from dskd_lightning.data.chat import ChatRenderer, RenderedTurn
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.data.formats import InvalidRecord, detect_format, parse_record
from dskd_lightning.data.truncation import Window, windows
from dskd_lightning.errors import UserError
from dskd_lightning.models.spec import StudentSpec, TeacherSpec

RENDERERS = [
    ChatRenderer(make_tokenizer("bpe", chat=False)),
    ChatRenderer(make_tokenizer("sentencepiece", add_bos=True, chat=False)),
]


def tokens_within(document: RenderedTurn, window: Window) -> int:
    """Of its response, without the end."""
    ends = document.spans.ends[~document.spans.end]
    return int(((ends > window.start) & (ends <= window.end)).sum())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@hypothesis.example(text="a🙂🙂", length=8)
@given(
    text=st.text(st.sampled_from("apples naïve 🙂日本\n<|end|> 12"), min_size=1, max_size=120),
    length=st.integers(8, 60),
)
def test_windows_follow_each_other_without_a_hole(text: str, length: int) -> None:
    documents = [renderer.render(Example((Message("assistant", text),))).turns[0] for renderer in RENDERERS]
    found = list(windows(documents, text, length))
    content = text.encode()
    assert b"".join(content[w.start : w.end] for w in found) == content
    left_out = [window for window in found if not window.conversations]
    for window in left_out:  # rightly: the smallest piece that the models share is too long for one of them
        assert any(tokens_within(d, window) > length - len(d.prompt_ids) for d in documents)
    assume(not left_out)
    for model, whole in enumerate(documents):
        pieces = [window.conversations[model].turns[0] for window in found]
        tokens = [token for piece in pieces for token in piece.response_ids]
        assert tokens == whole.response_ids[: len(tokens)]
        assert len(whole.response_ids) - len(tokens) <= 1  # the end, where the last window was full
        assert all(piece.prompt_ids == whole.prompt_ids for piece in pieces)
        assert all(len(piece.prompt_ids) + len(piece.response_ids) <= length for piece in pieces)
        for window, piece in zip(found, pieces, strict=True):
            assert piece.spans.length == window.end - window.start
            assert len(piece.spans) == len(piece.response_ids)
    for window in found:
        content[window.start : window.end].decode()
        first, second = (side.turns[0] for side in window.conversations)
        pairs = align(first.spans, second.spans)
        assert pairs.groups > 0 or first.spans.unknown.any() or second.spans.unknown.any()


def test_a_piece_that_fits_no_window_is_left_out_and_the_rest_is_read() -> None:
    text = "a" + "𐎀" * 9 + "z" * 40  # four tokens each
    word = make_tokenizer("bpe", chat=False)
    documents = [ChatRenderer(word).render(Example((Message("assistant", text),))).turns[0]]
    found = list(windows(documents, text, 4))  # one token in front, three of text
    assert b"".join(text.encode()[w.start : w.end] for w in found) == text.encode()
    assert [bool(w.conversations) for w in found[:3]] == [True, False, False]
    assert all(w.conversations for w in found[10:])


def test_formats_of_documents() -> None:
    for key in ("text", "content"):
        record = {key: " a\n", "id": 3}
        assert detect_format(record, "f") == "text"
        unused = Counter[str]()
        example = parse_record(record, "text", "f", 1, unused=unused)
        assert example.messages == (Message("assistant", " a\n"),)
        assert example.is_document
        assert example.with_system("x") is example
        assert unused == {"id": 1}
    with pytest.raises(InvalidRecord, match=r"f:1 has no text \(its fields: text\)"):
        parse_record({"text": " "}, "text", "f", 1)
    with pytest.raises(InvalidRecord, match="asks nothing"):
        parse_record({"text": "a"}, "text", "f", 1, needs_response=False)


@pytest.mark.parametrize("mode", [{}, {"packing": True}, {"max_tokens_per_batch": 64}])
def test_base_models_learn_whole_documents(model_folder, tmp_path: Path, mode: dict) -> None:
    texts = [f" Document {i}: " + "apples, pears and plums. " * (i + 1) for i in range(8)]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts))
    dm = InstructionDataModule(
        train=str(path),
        student=StudentSpec(model_folder(chat=False)),
        teacher=TeacherSpec(model_folder(tokenizer="sentencepiece", add_bos=True)),
        max_length=48,
        max_prompt_length=8,
        cache_dir=str(tmp_path / "cache"),
        **mode,
    )
    view = dm.examples("train")
    read: dict[int, str] = {}
    for example in view:
        read[example.line] = read.get(example.line, "") + (example.response or "")
    assert list(read.values()) == texts
    assert (dm.report["train"]["read"], dm.report["train"]["used"]) == (8, len(view))
    seen = []
    for batch in dm.train_dataloader():
        seen += batch.examples.tolist()
        for side in (batch.student, *batch.teachers):
            assert side.input_ids.shape[1] <= 48
        learnt = (batch.student.labels != -100).sum()
        assert learnt == len(batch.alignments[0].student_group)
    assert sorted(seen) == list(range(len(view)))
    tokens = [view.dataset.rendered(row, 0) for row in range(len(view))]
    assert all(len(item.response) == len(item) for item in tokens)  # everything is learnt
    assert dm.generation_prompt(view[0], 1) == [dm.teacher_tokenizers[0].bos_token_id]
    ends = sum(int(np.any(item.spans[0].end)) for item in tokens)
    assert ends == 8
    (tmp_path / "chat.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    dm.sources["val"] = str(tmp_path / "chat.jsonl")
    with pytest.raises(UserError, match="no chat template"):
        dm.examples("val")


def test_the_collator_takes_all_windows(model_folder) -> None:
    from dskd_lightning.models.loaded import Loaded

    model = Loaded(*StudentSpec(model_folder()).build())
    collate = DistillationCollator(model, max_length=32, max_prompt_length=8)
    batch = collate([{"text": "apples and pears " * 10}, {"text": "plums"}])
    assert batch.examples.tolist()[-1] == 1
    assert batch.examples.tolist().count(0) > 1
    assert collate.report["used"] == 2
