"""Work that several jobs share without knowing of each other: each takes every n-th piece."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dskd_lightning.errors import UserError

__all__ = ["Part", "missing_parts", "number_ranges"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Part:
    """Every ``of``-th piece of something, beginning with number ``number``, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """``3/16``.

        Raises:
            UserError: it is no such thing.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--part: {text!r} is no part: write 3/16 for the third of sixteen.")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def from_name(cls, name: str) -> Part | None:
        """The part that a file or folder is named after; None where it is named after none."""
        found = re.fullmatch(r"part-(\d+)-of-(\d+)", name)
        return None if found is None else cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"

    @property
    def name(self) -> str:
        """For files and folders."""
        return f"part-{self.number:05d}-of-{self.of:05d}"

    def rank(self, rank: int, ranks: int) -> tuple[int, int]:
        """Of a process of this job, among the processes of all jobs."""
        return (self.number - 1) * ranks + rank, self.of * ranks

    def take(self, items: Sequence[_T]) -> Sequence[_T]:
        """This part of ``items``."""
        return items[self.number - 1 :: self.of]


def missing_parts(found: Iterable[Part]) -> str | None:
    """``parts 2, 4-6 of 16``; None where all are there, or they are parts of different wholes."""
    parts = set(found)
    if len({part.of for part in parts}) != 1:
        return None
    (of,) = {part.of for part in parts}
    absent = sorted(set(range(1, of + 1)) - {part.number for part in parts})
    if not absent:
        return None
    return f"{'part' if len(absent) == 1 else 'parts'} {number_ranges(absent)} of {of}"


def number_ranges(numbers: Sequence[int]) -> str:
    """``1, 4-6`` of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
