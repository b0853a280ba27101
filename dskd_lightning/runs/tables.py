"""Prompts and responses side by side: for the terminal and for loggers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from dskd_lightning.errors import UserError
from dskd_lightning.runs.text import shorten, visible

__all__ = ["CompletionTable"]


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
