"""Text metrics as `torchmetrics.Metric`: sums that add up over batches and ranks."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rouge_score.tokenizers import Tokenizer
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.rouge import rouge_l
from dskd_lightning.functional.precision import widest

__all__ = [
    "DistinctN",
    "ExactMatch",
    "ResponseLength",
    "RougeL",
    "exact_match",
    "normalize_answer",
]

_UNIT = 1 << 36  # of a score: sums of integers are exact in any order, on devices without float64 too
_ODD = np.uint64(0x9E3779B97F4A7C15)
_TOGETHER = 1024  # predictions whose n-grams are made unique at once
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, single spaces: how the papers compare answers."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the normalised prediction equals a normalised reference, else 0.0."""
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(reference) for reference in references))


class _MeanScore(Metric):
    """Mean over predictions of a score in [0, 1], in percent."""

    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def score(self, prediction: str, references: Sequence[str]) -> float:
        raise NotImplementedError

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add predictions, each with its list of references."""
        if len(predictions) != len(references):
            raise UserError(f"{len(predictions)} predictions but {len(references)} lists of references.")
        pairs = zip(predictions, references, strict=True)
        self.total += sum(round(self.score(*pair) * _UNIT) for pair in pairs)
        self.count += len(predictions)

    def compute(self) -> Tensor:
        """Mean in percent; 0 where nothing was counted."""
        share = self.total.to(widest(self.total.device)) / _UNIT
        return 100 * share / self.count.clamp(min=1)


class RougeL(_MeanScore):
    """Mean ROUGE-L F-measure in percent, the best over each prediction's references.

    Args:
        tokenizer: see `rouge_l`.
        kwargs: of `torchmetrics.Metric`.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizer = tokenizer

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return rouge_l(prediction, references, self.tokenizer)


class ExactMatch(_MeanScore):
    """Share in percent of predictions that equal a reference after `normalize_answer`."""

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return exact_match(prediction, references)


class DistinctN(Metric):
    """Distinct n-grams over all n-grams of all predictions (arXiv 1510.03055), in [0, 1].

    N-grams of words are kept as 64-bit hashes, so that ranks can pool them.

    Args:
        n: length of the n-grams.
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    hashes: list[Tensor]
    count: Tensor

    def __init__(self, n: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n < 1:
            raise UserError(f"DistinctN: n must be at least 1, not {n}.")
        self.n = n
        self.add_state("hashes", [], dist_reduce_fx="cat")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str]) -> None:
        """Add predictions."""
        for start in range(0, len(predictions), _TOGETHER):
            words = (re.findall(r"\w+", text.lower()) for text in predictions[start : start + _TOGETHER])
            grams = np.concatenate([_gram_hashes(found, self.n) for found in words])
            self.count += len(grams)
            if len(grams):
                self.hashes.append(torch.from_numpy(np.unique(grams)).to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As `Metric.sync`; a rank without predictions takes part with integers, as the others do."""
        if not self.hashes:
            self.hashes.append(torch.zeros(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Share of distinct n-grams; 0 where there are none."""
        if not int(self.count):
            return torch.zeros((), device=self.device)
        return dim_zero_cat(self.hashes).unique().numel() / self.count.clamp(min=1)


class ResponseLength(Metric):
    """Mean response tokens, share of empty and share of unfinished responses."""

    full_state_update = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        """Add responses by their token counts and whether they ended by themselves."""
        empty = sum(count == 0 for count in tokens)
        unfinished = sum(not done for done in finished)
        self.sums += torch.tensor([sum(tokens), empty, unfinished, len(tokens)], device=self.device)

    def compute(self) -> dict[str, Tensor]:
        """``response_tokens``, ``empty_share`` and ``unfinished_share``."""
        tokens, empty, unfinished, count = self.sums.to(widest(self.sums.device))
        count = count.clamp(min=1)
        return {
            "response_tokens": tokens / count,
            "empty_share": empty / count,
            "unfinished_share": unfinished / count,
        }


def _gram_hashes(words: Sequence[str], n: int) -> npt.NDArray[np.int64]:
    """``[n-grams]``, a hash of each: a polynomial, modulo 2^64, of the hashes of its words."""
    hashes = np.array([_hash(word) for word in words], np.uint64)
    grams = np.zeros(max(0, len(words) - n + 1), np.uint64)
    for place in range(n):
        grams = grams * _ODD + hashes[place : place + len(grams)]
    return grams.view(np.int64)


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )
