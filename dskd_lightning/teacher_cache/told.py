"""Log-probabilities as servers and files write them, read as `LogProbabilities`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from dskd_lightning.structures import LogProbabilities

__all__ = ["Vocabulary", "WrongVocabulary", "entries_of", "log_probabilities", "nothing_known"]

_ID = "token_id:"  # how vLLM writes an id where a token's text belongs

Entry = tuple[int | str | None, float]
"""A token, by its id, its text or (the observed one) not at all, and its log-probability."""


class WrongVocabulary(Exception):
    """The tokens aren't those that the teacher's tokenizer gives."""


class Vocabulary:
    """Ids of tokens that are given by their text.

    Args:
        tokenizer: the teacher's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        self._ids: dict[str, int | None] = {}
        for index, forms in enumerate(zip(names, texts, strict=True)):
            for form in {form for form in forms if form}:
                self._ids[form] = None if self._ids.get(form, index) != index else index

    def id_of(self, token: int | str | None) -> int | None:
        """The id; None for a text that stands for no token, or for several."""
        if not isinstance(token, str):
            return token
        if token.startswith(_ID) and token[len(_ID) :].isdigit():
            return int(token[len(_ID) :])
        return self._ids.get(token)

    def check(self, token: int | str | None, expected: int) -> None:
        """Compare an observed token with the one that the tokenizer gave.

        Raises:
            WrongVocabulary: it is clearly another one.
        """
        if token is None:
            return
        if isinstance(token, int) or token.startswith(_ID):
            if self.id_of(token) != expected:
                raise WrongVocabulary(f"{token!r} where the tokenizer has {expected}")
            return
        mine = (
            _plain(self.tokenizer.convert_ids_to_tokens(expected)),
            _plain(self.tokenizer.decode([expected])),
        )
        given = _plain(token)
        if given and given.isascii() and not token.startswith("bytes:") and given not in mine:
            raise WrongVocabulary(f"{token!r} where the tokenizer has {mine[1]!r}")


def _plain(text: str) -> str:
    for mark, space in (("▁", " "), ("Ġ", " "), ("Ċ", "\n"), ("ĉ", "\t")):
        text = text.replace(mark, space)
    return text.strip()


def entries_of(value: Any) -> list[Entry]:
    """The entries of one position, the observed token first where it is named.

    A number (the observed token's); vLLM's ``{"ID": {"logprob": ...}}``; OpenAI's chat form
    ``{"token": ..., "logprob": ..., "top_logprobs": [...]}``; or a list of tokens with ``token_id`` or
    ``token`` and ``logprob``.

    Raises:
        ValueError: it is none of these.
    """
    if value is None:
        return []
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [(None, float(value))]
    if isinstance(value, Mapping) and "logprob" in value:
        others = value.get("top_logprobs") or []
        return [_entry(value), *(_entry(other) for other in others)]
    if isinstance(value, Mapping):
        return [
            (int(key), float(item["logprob"] if isinstance(item, Mapping) else item))
            for key, item in value.items()
            if item is not None
        ]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_entry(item) for item in value]
    raise ValueError(f"{type(value).__name__} is no log-probability")


def _entry(item: Mapping[str, Any]) -> Entry:
    token = item.get("token_id", item.get("token"))
    return token, float(item["logprob"])


def nothing_known(positions: int, k: int) -> LogProbabilities:
    """``[positions, 1 + k]`` without an entry."""
    ids = torch.full((positions, 1 + k), -1, dtype=torch.int32)
    return LogProbabilities(ids, torch.full((positions, 1 + k), -torch.inf))


def log_probabilities(
    positions: Iterable[list[Entry]], labels: Sequence[int], vocabulary: Vocabulary, k: int
) -> LogProbabilities:
    """``[m, 1 + k]`` of ``m`` positions.

    Args:
        positions: per label the entries of its position; fewer positions leave the last unknown.
        labels: ``[m]``, the observed tokens' ids.
        vocabulary: of the teacher.
        k: most other tokens of a position.

    Raises:
        WrongVocabulary: an observed token isn't the label.
        ValueError: a log-probability is no number.
    """
    empty = nothing_known(len(labels), k)
    ids, values = empty.ids, empty.values
    for row, (entries, label) in enumerate(zip(positions, labels, strict=False)):
        observed, others = None, dict[int, float]()
        for index, (token, value) in enumerate(entries):
            if math.isnan(value) or value > 1e-3:
                raise ValueError(f"{value} is no log-probability")
            found = vocabulary.id_of(token)
            named = isinstance(token, str) and not token.startswith(_ID)
            if index == 0 and (token is None or named):  # the place says which one it is
                vocabulary.check(token, label)
                found = label
            if found == label:
                observed = value if observed is None else observed
            elif found is not None and math.isfinite(value):
                others.setdefault(found, value)
        if entries and observed is None:
            raise WrongVocabulary(f"no log-probability of token {label}, which was observed")
        if observed is None or not math.isfinite(observed):
            continue
        best = sorted(others.items(), key=lambda item: -item[1])[:k]
        kept = [(label, observed), *best]
        ids[row, : len(kept)] = torch.tensor([index for index, _ in kept], dtype=torch.int32)
        values[row, : len(kept)] = torch.tensor([min(value, 0.0) for _, value in kept])
    return LogProbabilities(ids, values)
