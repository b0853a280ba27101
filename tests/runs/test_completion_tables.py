from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from dskd_lightning.errors import UserError
from dskd_lightning.runs.tables import CompletionTable, number_tables
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


NUMBERS = (
    "", "perplexity", "per byte", "KL to teacher", "top-1 agreement", "KL (aligned)", "agreement (aligned)",
    "ROUGE-L", "± over seeds", "training s", "peak GiB",
)  # fmt: skip
ROWS = [
    ["before training", "3201994.08", "42.000", "13.490", "0.0%", "12.300", "0.1%", "0.0", "0.1", "", "1.2"],
    [
        "DSKD CMA adversarial",
        "29.60",
        "4.100",
        "2.660",
        "37.3%",
        "2.100",
        "41.0%",
        "21.3",
        "0.4",
        "131",
        "2.4",
    ],
]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_tables_of_numbers_fit_and_cut_no_word(width) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=False)
    tables = number_tables(NUMBERS, ROWS, console.width, Text("results"))
    for table in tables:
        console.print(table)
    shown = stream.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    words = shown.split()
    for text in (*NUMBERS, *(cell for row in ROWS for cell in row)):
        assert all(word in words for word in text.split()), text
    assert "…" not in shown
    assert (len(tables) == 1) == (width >= 200) or width == 100
    for number in ("3201994.08", "2.4"):
        assert words.count(number) == sum(row.count(number) for row in ROWS)


def test_long_names_leave_room_for_numbers() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    rows = [
        ["a name of " + "many words " * 9, "1.00", "+0.10 (-0.20, +0.30)", "0.5", "10/20/30", "undecided"]
    ]
    headings = ("run", "mean", "difference (95%)", "p", "win/tie/loss", "")
    (table,) = number_tables(headings, rows, console.width)
    console.print(table)
    assert "+0.10 (-0.20, +0.30)" in stream.getvalue()
    assert "undecided" in stream.getvalue()
    assert max(map(len, stream.getvalue().splitlines())) <= 80
