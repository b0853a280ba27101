"""``dskd vocab TEACHER STUDENT``: load two tokenizers and texts, compare, print and save."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rich.console import Console

from dskd_lightning.alignment.byte_spans import token_byte_spans
from dskd_lightning.alignment.exact import align
from dskd_lightning.alignment.token_bytes import token_bytes, token_text
from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.tokenizers import sanitize_text
from dskd_lightning.vocab.analysis import analyze_vocabularies
from dskd_lightning.vocab.attention import draw_attention
from dskd_lightning.vocab.heatmap import save_heatmap
from dskd_lightning.vocab.rendering import print_report
from dskd_lightning.vocab.report import VocabReport

__all__ = ["SAMPLE", "draw_heatmaps", "read_responses", "run_vocab"]

_log = logging.getLogger(__name__)

SAMPLE = (
    "The three largest cities are Tokyo, Delhi and Shanghai; together they hold over 100,000,000 people.",
    "1. Preheat the oven to 180 °C.\n2. Mix 250 g of flour with 3 eggs.\n3. Bake for 45 minutes.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Ein naïver Café-Besitzer in Zürich öffnete schließlich um 7:30 Uhr.",
    "Привет! 今天天气很好。 مرحبا بالعالم. 안녕하세요 🙂👩‍👩‍👧",
)
"""Judged by where no data is given: prose, numbers, code and other scripts."""


def run_vocab(
    teacher: str,
    student: str,
    data: str | None = None,
    json_path: str | None = None,
    heatmap: str | None = None,
    *,
    limit: int = 2000,
    examples: int = 3,
    run: str | None = None,
    console: Console | None = None,
) -> VocabReport:
    """Compare the tokenizers of two models; print tables, write JSON and pictures where asked.

    Args:
        teacher: as `ModelSpec.source`, or a ``tokenizer.json``.
        student: likewise.
        data: a file or dataset that training reads; None takes a built-in sample.
        json_path: file for the report.
        heatmap: PNG file of the first example, further ones beside it as ``NAME-2.png`` ...
        limit: most examples to read.
        examples: how many pictures.
        run: a run folder whose cross-model attention the pictures show, with the byte-exact groups
            outlined; None shades the groups.
        console: where to print.

    Raises:
        UserError: a tokenizer, the data or the run can't be read; ``run`` without data or picture.
    """
    if run is not None and (data is None or heatmap is None):
        raise UserError("--run draws a run's attention on examples: give --data FILE and --heatmap PNG, too.")
    from dskd_lightning.models.spec import ModelSpec
    from dskd_lightning.models.tokenizer import load_tokenizer

    first, second = (
        load_tokenizer(ModelSpec(source=name, tokenizer=name if name.endswith(".json") else None))
        for name in (teacher, student)
    )
    texts = list(SAMPLE) if data is None else read_responses(data, limit)
    label = "built-in sample: give --data for your own texts" if data is None else data
    report = analyze_vocabularies(first, second, texts, names=(teacher, student), data=label)
    print_report(report, console)
    if json_path is not None:
        write_atomic(json_path, json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n")
    if heatmap is not None:
        if run is not None and data is not None:
            draw_attention(run, data, heatmap, examples)
        else:
            draw_heatmaps(heatmap, first, second, texts[:examples])
    return report


def read_responses(data: str, limit: int) -> list[str]:
    """Responses of at most ``limit`` examples of a file or dataset that training could read.

    Raises:
        UserError: it can't be read, or has no response.
    """
    from collections import Counter

    from dskd_lightning.data.preparation import PreparationSettings
    from dskd_lightning.data.reading import read_examples
    from dskd_lightning.data.sources import resolve_sources
    from dskd_lightning.data.urls import masked

    settings = PreparationSettings(limit=limit)
    texts = [
        message.content
        for example in read_examples(resolve_sources(data), settings, Counter())
        for message in example.messages
        if message.role == "assistant"
    ]
    if not texts:
        raise UserError(f"'{masked(data)}' has no response to compare tokenizers on: give a file with some.")
    return texts


def draw_heatmaps(
    path: str,
    teacher: Any,
    student: Any,
    texts: list[str],
) -> list[Path]:
    """One PNG per text that has tokens on both sides (others are logged); returns their paths."""
    first, drawn = Path(path), []
    for number, text in enumerate(map(sanitize_text, texts), 1):
        spans, names = [], []
        for tokenizer in (student, teacher):
            table = token_bytes(tokenizer)
            ids = table.tracer.encode(text, add_special_tokens=False).ids
            spans.append(token_byte_spans(tokenizer, text, ids, ()))
            names.append([token_text(table.pieces[index]) for index in ids])
        if not all(names):
            _log.warning("Example %d has no tokens to draw and gets no heatmap.", number)
            continue
        target = first if number == 1 else first.with_stem(f"{first.stem}-{number}")
        save_heatmap(target, names[0], names[1], align(*spans), title=token_text(text[:60].encode()))
        drawn.append(target)
    return drawn
