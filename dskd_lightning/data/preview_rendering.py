"""A `DataPreview` as terminal tables and as HTML; whatever data hold is shown and never obeyed.

Within a response ``│`` stands where tokens of both models end, ``┊`` where only this model's does, and
``✗`` before a token that covers no bytes of the other's: what lies between two ``│`` is a byte-exact pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dskd_lightning.runs.text import visible

if TYPE_CHECKING:
    from dskd_lightning.data.preview import DataPreview, Reading, RecordPreview, StagePreview, TurnReading

__all__ = ["as_html", "as_terminal"]

_STYLES = {"exact": "green", "group": "yellow", "none": "red", "": "cyan"}
_COLOURS = {"exact": "46,160,67", "group": "210,153,34", "none": "248,81,73", "": "56,139,253"}
_LEGEND = "│ ends a token of both models, ┊ of this one alone, ✗ has no counterpart"
_PROMPT, _TOKENS = 600, 160  # shown of each; JSON has all


def as_terminal(preview: DataPreview) -> Group:
    """Tables of every stage."""
    parts: list[Table | Text] = []
    for name, stage in preview.stages.items():
        parts.append(_stage_table(preview, name, stage))
        parts.append(Text(visible("".join(f"  {what}: {n:,}\n" for what, n in stage.counts.items()))))
        for file in stage.files:
            parts.append(Text(visible(f"{file.name}: {file.examples:,} examples"), style="bold"))
            parts += [_record_table(preview, record) for record in file.records]
    if len(preview.models) > 1:
        parts.append(Text(_LEGEND, style="dim"))
    return Group(*parts)


def _stage_table(preview: DataPreview, name: str, stage: StagePreview) -> Table:
    table = Table(title=Text(name), title_justify="left")
    for heading in ("", "shortest", "median", "longest", "tokens", "learnt"):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for model, found in zip(preview.models, stage.lengths, strict=True):
        numbers = (found.shortest, found.median, found.longest, found.total)
        table.add_row(Text(visible(model)), *(f"{n:,}" for n in numbers), f"{found.response_share:.0%}")
    return table


def _record_table(preview: DataPreview, record: RecordPreview) -> Table:
    table = Table(title=Text(visible(record.place)), title_justify="left", show_lines=True, expand=True)
    for model, reading in zip(preview.models, record.readings, strict=True):
        table.add_column(f"{_role(model)}: {_summary(reading)}", ratio=1, overflow="fold")
    for turns in zip(*(reading.turns for reading in record.readings), strict=True):
        cells = []
        for turn in turns:
            cell = Text(_shortened(visible(turn.prompt)), style="dim")
            for text, kind in _marked(turn):
                cell.append(text, style="not dim " + (_STYLES[kind] if kind is not None else "dim"))
            cells.append(cell)
        table.add_row(*cells)
    return table


def as_html(preview: DataPreview) -> str:
    """One piece of HTML without scripts or style sheets, for light and dark pages."""
    parts = []
    for name, stage in preview.stages.items():
        rows = [["", "shortest", "median", "longest", "tokens", "learnt"]]
        for model, found in zip(preview.models, stage.lengths, strict=True):
            numbers = (found.shortest, found.median, found.longest, found.total)
            rows.append([model, *(f"{n:,}" for n in numbers), f"{found.response_share:.0%}"])
        counts = "; ".join(f"{what}: {n:,}" for what, n in stage.counts.items())
        cells = "".join(f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<h4>{_safe(name)}</h4><table>{cells}</table><p>{_safe(counts)}</p>")
        for file in stage.files:
            parts.append(f"<p><b>{_safe(file.name)}</b>: {file.examples:,} examples</p>")
            parts += [_record_html(preview, record) for record in file.records]
    legend = f"<p>{_LEGEND}</p>" if len(preview.models) > 1 else ""
    return f"<div>{''.join(parts)}{legend}</div>"


def _record_html(preview: DataPreview, record: RecordPreview) -> str:
    cell = '<td style="vertical-align:top;text-align:left;white-space:pre-wrap;word-break:break-word">'
    heads = "".join(
        f'<th style="text-align:left">{_role(model)}: {_summary(reading)}</th>'
        for model, reading in zip(preview.models, record.readings, strict=True)
    )
    rows = []
    for turns in zip(*(reading.turns for reading in record.readings), strict=True):
        rows.append("<tr>" + "".join(f"{cell}{_turn_html(turn)}</td>" for turn in turns) + "</tr>")
    return (
        f'<p>{_safe(record.place)}</p><table style="table-layout:fixed;width:100%"><tr>{heads}</tr>'
        f"{''.join(rows)}</table>"
    )


def _turn_html(turn: TurnReading) -> str:
    prompt = f'<span style="opacity:0.6">{_safe(_shortened(turn.prompt))}</span>'
    return prompt + "".join(
        _safe(text)
        if kind is None
        else f'<span style="background:rgba({_COLOURS[kind]},0.3)">{_safe(text)}</span>'
        for text, kind in _marked(turn)
    )


def _marked(turn: TurnReading) -> Iterator[tuple[str, str | None]]:
    """Tokens with their states, and what stands between them, whose state is None."""
    for number, text in enumerate(turn.tokens[:_TOKENS]):
        state = turn.states[number] if turn.states else ""
        inside = number > 0 and state == "group" and turn.groups[number] == turn.groups[number - 1]
        yield ("┊" if inside else "│"), None
        yield ("✗" if state == "none" else "") + visible(text), state
    rest = len(turn.tokens) - _TOKENS
    if turn.tokens:
        yield "│" + (f" … {rest:,} more tokens" if rest > 0 else ""), None
    else:
        yield " … to be answered", None


def _role(model: str) -> str:
    return model.partition(" ")[0]


def _summary(reading: Reading) -> str:
    learnt = [turn for turn in reading.turns if turn.tokens]
    count = sum(len(turn.tokens) for turn in learnt)
    text = f"{reading.tokens:,} tokens, {count:,} learnt"
    states = [state for turn in learnt for state in turn.states]
    if not states:
        return text
    return f"{text}, {states.count('exact'):,} in exact pairs"


def _shortened(text: str) -> str:
    """The beginning and the end of a long prompt."""
    half = _PROMPT // 2
    return text if len(text) <= _PROMPT else f"{text[:half]} […] {text[-half:]}"


def _safe(text: str) -> str:
    return escape(visible(text))
