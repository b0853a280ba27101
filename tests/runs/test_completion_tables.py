from __future__ import annotations

import io

import pytest
from rich.console import Console

from dskd_lightning.errors import UserError
from dskd_lightning.runs.tables import CompletionTable
from dskd_lightning.runs.text import shorten, visible

HOSTILE = "[red]x[/red] \x1b[31m\x07 | <b>&amp; `c` *d*\nnext \u202eline \ud800"


@pytest.fixture
def table() -> CompletionTable:
    return CompletionTable([HOSTILE, "short"], {"teacher": ["t", "u" * 900], "[b]student": [HOSTILE, ""]})


def test_terminal_shows_markup_and_control_characters_as_text(table) -> None:
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system=None, width=120).print(table.rich("[i]title"))
    shown = stream.getvalue()
    assert "[red]x[/red]" in shown
    assert "[b]student" in shown
    assert "[i]title" in shown
    assert "\x07" not in shown
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown
    assert "…" in shown


def test_markdown_keeps_one_row_a_prompt(table) -> None:
    lines = table.markdown().splitlines()
    assert len(lines) == 4
    assert lines[1] == "| --- | --- | --- |"
    assert "\\|" in lines[2]
    assert "&lt;b&gt;&amp;amp; \\`c\\` \\*d\\*<br>next" in lines[2]
    assert "<b>" not in lines[2]


def test_columns_of_different_lengths() -> None:
    with pytest.raises(UserError, match="2 prompts but 1 responses of teacher"):
        CompletionTable(["a", "b"], {"teacher": ["x"]})


def test_visible_keeps_scripts_and_emoji() -> None:
    text = "日本語 مرحبا 👩‍🚀\tx\n"
    assert visible(text) == text
    assert visible("a\r\nb\rc") == "a\nb\ufffdc"
    assert shorten("abcdef", 4) == "abc…"
