"""Rows of ``metrics.csv``."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from dskd_lightning.errors import UserError

__all__ = ["read_rows"]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Every row, without its empty cells; a last line that was cut off in writing is left out.

    Raises:
        UserError: the file is not what a CSV logger writes.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole, newline=""), strict=True)
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more columns than the header")
            for name in ("step", "epoch"):
                float(row.get(name) or 0)
            rows.append({name: value for name, value in row.items() if value})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: is damaged ({error}); correct it, or move it away to go on without its curves."
        ) from error
    return rows
