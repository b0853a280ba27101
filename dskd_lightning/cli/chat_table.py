"""The answers of a conversation side by side, whole or as much of them as a screen holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from dskd_lightning.runs.text import visible

__all__ = ["answers_table", "room_for_answers"]


@dataclass
class _Ending:
    """The last lines of a text, as many as fit."""

    text: Text
    lines: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wrapped = self.text.wrap(console, options.max_width, overflow="fold")
        yield from wrapped if len(wrapped) <= self.lines else [Text("…"), *wrapped[1 - self.lines :]]


def answers_table(answers: Mapping[str, str], lines: int | None = None) -> Table:
    """A column for each name, its answer below: the last ``lines`` lines of it, or all."""
    table = Table(expand=True, show_lines=False)
    for name in answers:
        table.add_column(Text(visible(name)), ratio=1, overflow="fold")
    texts = [Text(visible(text)) for text in answers.values()]
    table.add_row(*(texts if lines is None else [_Ending(text, lines) for text in texts]))
    return table


def room_for_answers(names: Iterable[str], console: Console) -> int:
    """How many lines of the answers a table can show that the console must draw over."""
    return max(2, console.height - len(console.render_lines(answers_table(dict.fromkeys(names, "")))))
