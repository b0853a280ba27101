"""``dskd vocab``: counts by hand on small cases, advice, files, and hostile token texts."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CORPUS, make_tokenizer
from rich.console import Console

from dskd_lightning.alignment.byte_spans import token_byte_spans
from dskd_lightning.alignment.exact import align, group_overlap
from dskd_lightning.alignment.token_bytes import token_text
from dskd_lightning.errors import UserError
from dskd_lightning.objectives import DSKDv2Objective
from dskd_lightning.structures import Head, ModelSpace
from dskd_lightning.vocab import analyze_vocabularies, run_vocab, save_heatmap
from dskd_lightning.vocab.analysis import kind_of_text
from dskd_lightning.vocab.rendering import print_report
from dskd_lightning.vocab.run import draw_heatmaps


def test_the_same_tokenizer_is_exact_everywhere() -> None:
    tokenizer = make_tokenizer("bpe")
    report = analyze_vocabularies(tokenizer, tokenizer, CORPUS[:5])
    shares = report.student_coverage.shares()
    assert report.identical
    assert shares["exact_occurrences"] == shares["exact_bytes"] == 1
    assert not report.offenders
    assert report.recommendation.class_path.endswith("DSKDv2Objective")


def test_special_tokens_that_one_side_has_alone_leave_one_vocabulary() -> None:
    """As the generations of a family differ, their ends of sequence too; the objectives take such pairs."""
    older, newer = make_tokenizer("bpe"), make_tokenizer("bpe")
    newer.add_special_tokens({"eos_token": "<|stop|>", "pad_token": "<tool_call>"})
    report = analyze_vocabularies(newer, older, CORPUS[:5])
    assert report.identical
    assert report.recommendation.class_path.endswith("DSKDv2Objective")
    assert "but for 2 that one side has alone" in report.recommendation.reason
    sides = [ModelSpace(Head(torch.zeros(len(t), 2)), torch.zeros(len(t), 2), t) for t in (older, newer)]
    DSKDv2Objective().configure(*sides)
    assert not analyze_vocabularies(make_tokenizer("bpe", 300), older, CORPUS[:5]).identical


@pytest.mark.parametrize("kinds", [("bpe", "sentencepiece"), ("unigram", "bpe"), ("bpe", "wordpiece")])
def test_counts_add_up(kinds: tuple[str, str]) -> None:
    teacher, student = map(make_tokenizer, kinds)
    report = analyze_vocabularies(teacher, student, [*CORPUS[:5], "☃ 12 12\n\n", "a\ud800"])
    for coverage, tokenizer in ((report.student_coverage, student), (report.teacher_coverage, teacher)):
        shares = coverage.shares()
        for what in ("occurrences", "bytes"):
            parts = [shares[f"{kind}_{what}"] for kind in ("exact", "grouped", "no_counterpart")]
            assert sum(parts) == pytest.approx(1)
            assert min(parts) >= 0
        ids = [
            tokenizer(t, add_special_tokens=False)["input_ids"]
            for t in [*CORPUS[:5], "☃ 12 12\n\n", "a\ufffd"]
        ]
        assert coverage.occurrences == sum(map(len, ids))
    assert sum(script.occurrences for script in report.scripts) == report.student_coverage.occurrences
    assert report.student_coverage.exact_bytes == report.teacher_coverage.exact_bytes
    json.dumps(report.to_dict())
    if "wordpiece" in kinds:
        assert report.normalized == ("student",)
        assert report.unknown_bytes["student"] > 0


def test_offenders_show_both_cuts() -> None:
    large, small = make_tokenizer("bpe", 400), make_tokenizer("bpe", 270)
    report = analyze_vocabularies(large, small, ["description description"])
    assert report.offenders
    for item in report.offenders:
        assert "".join(item.student) == "".join(item.teacher) == item.text
        assert item.student != item.teacher


def test_kinds_of_text() -> None:
    expected = {
        " 12": "digits", "\n\n": "whitespace", "Привет": "Cyrillic", "日": "Han", "abc": "Latin",
        "!?": "punctuation", "🙂": "emoji and symbols", "مر": "Arabic",
    }  # fmt: skip
    assert {text: kind_of_text(text.encode()) for text in expected} == expected
    assert kind_of_text(b"\xe6") == "part of a character"
    assert token_text(b" a\n\xe6\x1b[0m") == "␣a\\n\\xe6\\x1b[0m"


def test_markup_in_tokens_is_shown_not_read() -> None:
    one, two = make_tokenizer("bpe", 400), make_tokenizer("bpe", 270)
    report = analyze_vocabularies(one, two, ["[red] description [/red]"], names=("[bold]t[/bold]", "s"))
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=120))
    assert "[bold]t[/bold]" in stream.getvalue()
    assert report.recommendation.class_path in stream.getvalue()


def test_the_command_reads_folders_and_writes_json_and_pictures(
    model_folder: Callable[..., str], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "q", "response": text}) + "\n" for text in CORPUS[:4]))
    console = Console(file=io.StringIO(), width=120)
    teacher, student = model_folder(tokenizer="bpe"), model_folder(tokenizer="sentencepiece")
    outputs = str(tmp_path / "report.json"), str(tmp_path / "map.png")
    report = run_vocab(teacher, student, str(data), *outputs, examples=2, console=console)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert report.texts == saved["texts"] == 4
    assert saved["student_coverage"]["shares"]["exact_occurrences"] > 0
    for name in ("map.png", "map-2.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert run_vocab(teacher, student, console=console).texts == 5
    with pytest.raises(UserError):
        run_vocab(teacher, student, str(tmp_path / "missing.jsonl"), console=console)


def test_heatmaps_take_dollars_glyphs_and_attention(tmp_path: Path) -> None:
    one, two = make_tokenizer("bpe"), make_tokenizer("unigram")
    text = r"$\frac{1 $x_$ 日本 🙂"
    spans = [token_byte_spans(tokenizer, text) for tokenizer in (one, two)]
    result = align(*spans)
    overlap = group_overlap(result)
    assert overlap.shape == (len(spans[0]), len(spans[1]))
    assert overlap.sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = [["$\\frac{"] * len(side) for side in spans]
        save_heatmap(tmp_path / "a.png", *names, result, np.full(overlap.shape, 0.1), title="$^ 日", limit=8)
        drawn = draw_heatmaps(str(tmp_path / "b.png"), one, two, [text, ""])
    assert [path.name for path in drawn] == ["b.png"]
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="matrix of that shape"):
        save_heatmap(tmp_path / "c.png", names[0], names[1], result, np.zeros((1, 1)))
    assert not (tmp_path / "c.png").exists()
