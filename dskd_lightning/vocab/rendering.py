"""The report of ``dskd vocab`` as terminal tables."""

from __future__ import annotations

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dskd_lightning.vocab.report import VocabReport

__all__ = ["print_report", "render_report"]


def print_report(report: VocabReport, console: Console | None = None) -> None:
    """Print ``report``; token texts are never read as markup."""
    (console or Console()).print(render_report(report))


def render_report(report: VocabReport) -> Group:
    """The tables of ``report``."""
    parts: list[Table | Text] = [_overlap(report), _coverage(report), _scripts(report)]
    if report.offenders:
        parts.append(_offenders(report))
    if report.normalized:
        sides = " and ".join(report.normalized)
        parts.append(
            Text(f"The {sides} reads a normalised form of some texts: its spans are mapped back by offsets.")
        )
    advice = report.recommendation
    parts.append(Text(f"Recommended: {advice.class_path}\n  because {advice.reason}.", style="bold"))
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _overlap(report: VocabReport) -> Table:
    table = _table("Vocabulary", "", "tokens", "shared", "share")
    rows = (
        ("student", report.student, report.student_size, report.shared),
        ("teacher", report.teacher, report.teacher_size, report.teacher_shared),
    )
    for side, name, size, shared in rows:
        share = f"{shared / max(size, 1):.1%}"
        table.add_row(Text(f"{side} {name}"), f"{size:,}", f"{shared:,}", share)
    return table


def _coverage(report: VocabReport) -> Table:
    title = f"Counterparts in {report.texts:,} responses, {report.bytes:,} bytes"
    table = _table(title, "", "seen", "exact", "grouped", "none")
    for side, coverage in (("student", report.student_coverage), ("teacher", report.teacher_coverage)):
        shares = coverage.shares()
        table.add_row(
            f"{side} tokens (distinct)", f"{coverage.tokens:,}", f"{shares['exact_tokens']:.1%}", "", ""
        )
        for what, seen in (("occurrences", coverage.occurrences), ("bytes", coverage.bytes)):
            kinds = [f"{shares[f'{kind}_{what}']:.1%}" for kind in ("exact", "grouped", "no_counterpart")]
            table.add_row(f"{side} {what}", f"{seen:,}", *kinds)
        table.add_row(f"{side} unknown or dropped bytes", f"{report.unknown_bytes[side]:,}", "", "", "")
    if report.data:
        table.caption = Text(report.data)
    return table


def _scripts(report: VocabReport) -> Table:
    table = _table("Student tokens by kind of text", "kind", "occurrences", "not exact", "share")
    for script in report.scripts:
        share = f"{script.inexact / max(script.occurrences, 1):.1%}"
        table.add_row(Text(script.name), f"{script.occurrences:,}", f"{script.inexact:,}", share)
    return table


def _offenders(report: VocabReport) -> Table:
    table = Table(title="Cut differently most often", title_justify="left")
    for column in ("text", "student", "teacher"):
        table.add_column(column, overflow="fold")
    table.add_column("times", justify="right")
    for item in report.offenders:
        table.add_row(
            Text(item.text),
            Text(" | ".join(item.student)),
            Text(" | ".join(item.teacher)),
            f"{item.occurrences:,}",
        )
    return table
