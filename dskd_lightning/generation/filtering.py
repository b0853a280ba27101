"""Which of a teacher's sampled responses are worth learning from."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from dskd_lightning.errors import UserError

__all__ = ["Candidate", "ResponseFilter"]


@dataclass(frozen=True)
class Candidate:
    """One sampled response.

    Args:
        prompt: number of its prompt.
        text: the response.
        tokens: generated tokens, the end token not counted.
        finished: whether the model ended it itself.
        nll: nats per token by the model's own likelihood at temperature 1; None where it wasn't measured.
    """

    prompt: int
    text: str
    tokens: int
    finished: bool
    nll: float | None = None


@dataclass(frozen=True)
class ResponseFilter:
    """What is kept of each prompt's samples; an empty response never is.

    Args:
        finished: only those that ended by themselves.
        min_tokens: shorter ones are dropped.
        max_tokens: longer ones are dropped; None sets no such limit.
        duplicates: keep repeated texts of the same prompt.
        max_nll: those that the model finds less likely, in nats per token, are dropped.
        likeliest: of those left, only so many of the most likely of each prompt.
    """

    finished: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    duplicates: bool = False
    max_nll: float | None = None
    likeliest: int | None = None

    def __post_init__(self) -> None:
        if self.likeliest is not None and self.likeliest < 1:
            raise UserError(f"--likeliest: {self.likeliest} must be at least 1.")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise UserError(f"--max_tokens: {self.max_tokens} is less than --min_tokens, {self.min_tokens}.")

    @property
    def reads_likelihood(self) -> bool:
        """Whether candidates need their ``nll``."""
        return self.max_nll is not None or self.likeliest is not None

    def __call__(self, candidates: Iterable[Candidate]) -> tuple[list[Candidate], Mapping[str, int]]:
        """Those that are kept, in their order, and how many were dropped by which reason."""
        dropped: Counter[str] = Counter()
        kept: list[Candidate] = []
        seen: set[tuple[int, str]] = set()
        for candidate in candidates:
            reason = self._reason(candidate)
            key = (candidate.prompt, candidate.text.strip())
            if reason is None and not self.duplicates and key in seen:
                reason = "duplicate"
            if reason is not None:
                dropped[reason] += 1
                continue
            seen.add(key)
            kept.append(candidate)
        if self.likeliest is not None:
            best = self._likeliest(kept)
            dropped["less likely than others"] = len(kept) - len(best)
            kept = best
        return kept, {reason: count for reason, count in dropped.items() if count}

    def by_prompt(self, candidates: Iterable[Candidate], dropped: Counter[str]) -> Iterator[Candidate]:
        """Those that are kept, as a call gives them, with one prompt's candidates in memory at a time.

        Args:
            candidates: one prompt's behind another's.
            dropped: to which the number dropped by each reason is added.
        """
        for _, same in itertools.groupby(candidates, key=lambda candidate: candidate.prompt):
            kept, reasons = self(same)
            dropped.update(reasons)
            yield from kept

    def _reason(self, candidate: Candidate) -> str | None:
        if not candidate.text.strip():
            return "empty"
        if self.finished and not candidate.finished:
            return "unfinished"
        if candidate.tokens < self.min_tokens:
            return "too short"
        if self.max_tokens is not None and candidate.tokens > self.max_tokens:
            return "too long"
        if self.max_nll is not None and candidate.nll is not None and candidate.nll > self.max_nll:
            return "unlikely"
        return None

    def _likeliest(self, candidates: list[Candidate]) -> list[Candidate]:
        by_prompt: dict[int, list[int]] = {}
        for at, candidate in enumerate(candidates):
            by_prompt.setdefault(candidate.prompt, []).append(at)
        chosen: list[int] = []
        for places in by_prompt.values():
            places.sort(key=lambda at: (candidates[at].nll or 0.0, at))
            chosen += places[: self.likeliest]
        return [candidates[at] for at in sorted(chosen)]
