"""Prompts and responses side by side, for the terminal and for loggers; numbers that fit a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from dskd_lightning.errors import UserError
from dskd_lightning.runs.text import shorten, visible

__all__ = ["CompletionTable", "number_tables"]

_GAP = 2  # between columns
_LONGEST_NAME = 40


@dataclass(frozen=True)
class CompletionTable:
    """Completions of several models for the same prompts.

    Args:
        prompts: the prompts.
        responses: column title (``teacher``, ``student``) -> one response per prompt.
        limit: characters shown of each text.
    """

    prompts: Sequence[str]
    responses: Mapping[str, Sequence[str]]
    limit: int = 400

    def __post_init__(self) -> None:
        for title, column in self.responses.items():
            if len(column) != len(self.prompts):
                raise UserError(
                    f"completions: {len(self.prompts)} prompts but {len(column)} responses of {title}."
                )

    def rich(self, title: str | None = None) -> Table:
        """A terminal table; nothing in the texts is read as markup or as a terminal command."""
        table = Table(title=None if title is None else Text(visible(title)), show_lines=True, expand=True)
        for heading in self.headings():
            table.add_column(Text(heading), ratio=1, overflow="fold")
        for row in self.rows():
            table.add_row(*(Text(re.sub(r"\s*\n\s*", " ⏎ ", cell)) for cell in row))
        return table

    def markdown(self) -> str:
        """A Markdown table, as TensorBoard and MLflow show text."""
        headings = self.headings()
        lines = [_markdown_row(headings), _markdown_row(["---"] * len(headings), escape=False)]
        lines += [_markdown_row(row) for row in self.rows()]
        return "\n".join(lines) + "\n"

    def headings(self) -> list[str]:
        """Titles of the columns."""
        return ["prompt", *(visible(title) for title in self.responses)]

    def rows(self) -> list[list[str]]:
        """Cells as shown, control characters made visible."""
        columns = [self.prompts, *self.responses.values()]
        return [[shorten(visible(cell), self.limit) for cell in row] for row in zip(*columns, strict=True)]


def _markdown_row(cells: Sequence[str], escape: bool = True) -> str:
    return "| " + " | ".join(_escape(cell) if escape else cell for cell in cells) + " |"


def _escape(cell: str) -> str:
    # Entities first, then Markdown's own characters; a cell must stay on one line.
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        cell = cell.replace(character, entity)
    for character in "\\`*_{}[]()#!|~":
        cell = cell.replace(character, f"\\{character}")
    return cell.replace("\n", "<br>").replace("\t", " ")


def number_tables(
    headings: Sequence[str], rows: Sequence[Sequence[str | Text]], width: int, title: Text | None = None
) -> list[Table]:
    """A table of numbers, or several where it is wider than ``width``; no word of it is ever cut.

    Args:
        headings: of the columns; the first is that of the names, which every table has.
        rows: a name, and one cell for each other heading.
        width: of the terminal.
        title: of the first table.
    """
    widths = [
        max(_longest_word(heading), *(cell_len(str(row[column])) for row in rows), 1)
        for column, heading in enumerate(headings)
    ]
    names = [shorten(str(row[0]), _LONGEST_NAME) for row in rows]
    full = max(map(cell_len, [headings[0], *names]))
    least = max(map(_longest_word, [headings[0], *names]))
    blocks: list[list[int]] = [[]]
    for column in range(1, len(headings)):
        if blocks[-1] and least + sum(widths[c] + _GAP for c in (*blocks[-1], column)) > width:
            blocks.append([])
        blocks[-1].append(column)
    tables = []
    for block in blocks:
        room = width - sum(widths[column] + _GAP for column in block)
        table = Table(
            title=title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, _GAP - 1, 0, 0),
        )
        table.add_column(headings[0], width=max(least, min(full, room)))
        for column in block:
            table.add_column(headings[column], width=widths[column], justify="right")
        for name, row in zip(names, rows, strict=True):
            table.add_row(Text(name), *(row[column] for column in block))
        tables.append(table)
        title = None
    return tables


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)
