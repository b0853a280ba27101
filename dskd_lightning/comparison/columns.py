"""Numbers of runs as tables show them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["known_columns"]


def known_columns(
    columns: Sequence[tuple[str, float, str]], items: Sequence[object]
) -> tuple[list[str], list[list[float | None]]]:
    """Headings and one row of numbers per item, without what is known of none.

    Args:
        columns: heading, factor and attribute of each number.
        items: that have these attributes, None where one isn't known.
    """
    shown = [column for column in columns if any(getattr(item, column[2]) is not None for item in items)]
    rows = [[_times(factor, getattr(item, name)) for _, factor, name in shown] for item in items]
    return [heading for heading, _, _ in shown], rows


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
