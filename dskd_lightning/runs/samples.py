"""What a student wrote by itself, and what its teacher thinks of each piece, as a run folder keeps it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, write_object
from dskd_lightning.runs.identity import MODEL_KEY

__all__ = ["SampledResponse", "read_samples", "write_samples"]

_SURE, _DOUBTFUL = 0.5, 0.1


@dataclass(frozen=True)
class SampledResponse:
    """One sample in pieces that both models read as whole tokens.

    Args:
        prompt: text of the tokens in front of it.
        pieces: of the text, in order.
        student: natural logarithm of the probability that the student gives each piece.
        teacher: likewise; None for a piece that the teacher's tokens cut otherwise.
    """

    prompt: str
    pieces: tuple[str, ...]
    student: tuple[float, ...]
    teacher: tuple[float | None, ...]

    def opinions(self) -> list[tuple[str, str, float | None]]:
        """Each piece; ``likely``, ``doubtful``, ``unlikely`` or ``unread``; and the teacher's probability."""
        found: list[tuple[str, str, float | None]] = []
        for piece, score in zip(self.pieces, self.teacher, strict=True):
            if score is None:
                found.append((piece, "unread", None))
                continue
            p = math.exp(score)
            found.append((piece, "likely" if p >= _SURE else "doubtful" if p >= _DOUBTFUL else "unlikely", p))
        return found


def write_samples(
    path: Path, samples: Iterable[SampledResponse], model: dict[str, Any] | None = None
) -> None:
    """Samples as JSON, and which model has written them, see `identity`."""
    values: dict[str, Any] = {"samples": [asdict(sample) for sample in samples]}
    if model is not None:
        values[MODEL_KEY] = model
    write_object(path, values, indent=1)


def read_samples(path: Path) -> tuple[SampledResponse, ...]:
    """Samples of `write_samples`; none where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return ()
    values = read_object(path, "delete it: the next test writes it again")
    try:
        found = tuple(
            SampledResponse(
                str(value["prompt"]),
                tuple(map(str, value["pieces"])),
                tuple(map(float, value["student"])),
                tuple(None if score is None else float(score) for score in value["teacher"]),
            )
            for value in values["samples"]
        )
        if any(not len(s.pieces) == len(s.student) == len(s.teacher) for s in found):
            raise ValueError("pieces and their scores differ in number")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: holds no samples ({error}); delete it, the next test writes it again."
        ) from error
    return found
