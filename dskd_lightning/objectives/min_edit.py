"""Minimum edit distance alignment of tokens and vocabularies (MinED, FuseLLM, arXiv 2401.10491)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dskd_lightning.alignment.min_edit import align_tokens
from dskd_lightning.errors import UserError
from dskd_lightning.functional import Divergence, ForwardKL
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.objectives._vocabulary import nearest_map, token_strings
from dskd_lightning.objectives.paired import PairedObjective, Pairs, Partners
from dskd_lightning.objectives.shared_vocabulary import pair_positions
from dskd_lightning.structures import Alignment, ModelSpace, Side

__all__ = ["MinEditObjective"]

_CACHED_EXAMPLES = 65536


class MinEditObjective(PairedObjective):
    """The teacher's distribution moved into the student's vocabulary by nearest tokens.

    Where the two token sequences align one to one and the teacher's token maps to the student's,
    each teacher token's probability goes to its nearest student token by edit distance. Elsewhere
    the target is a one-hot of the gold token, whose divergence is the cross-entropy at the
    temperature.

    Args:
        divergence: compares the moved and the student's distribution; forward KL by default.
        alignment: ``edit_distance`` aligns the sequences as published, by dynamic programming on
            the CPU, once per example (it reads the labels back from the accelerator); ``bytes``
            takes the byte-exact pairs of the data pipeline, which costs nothing.
        cache_dir: folder that keeps the nearest-token map between runs; None makes it anew.
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in KD.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    vocabulary_copies = 16  # the moved distribution beside both sides'

    def __init__(
        self,
        divergence: Divergence | None = None,
        alignment: Literal["edit_distance", "bytes"] = "edit_distance",
        cache_dir: str | None = None,
        kd_ratio: float = 0.5,
        temperature: float = 2.0,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(kd_ratio, temperature, memory_budget_mb)
        if alignment not in ("edit_distance", "bytes"):
            raise UserError(
                f"alignment of MinEditObjective must be 'edit_distance' or 'bytes', not {alignment!r}."
            )
        self.divergence = ForwardKL() if divergence is None else divergence
        self.alignment = alignment
        self.cache_dir = cache_dir
        self._partners: OrderedDict[tuple[bytes, bytes], np.ndarray] = OrderedDict()
        self._strings: tuple[list[str], list[str]] = ([], [])

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        super().configure(student, teacher)
        assert teacher is not None
        self.register_buffer("nearest", nearest_map(student, teacher, self.cache_dir), persistent=False)
        self._strings = (token_strings(student), token_strings(teacher))

    def partners(self, student: Side, teacher: Side, alignment: Alignment) -> Partners:
        if self.alignment == "bytes":
            position = pair_positions(student, alignment)
        else:
            position = self._edit_positions(student, teacher)
        if not len(teacher):
            return Partners(position)
        mapped = self.get_buffer("nearest")[teacher.labels][position.clamp(min=0)]
        most = len(alignment.pairs) if self.alignment == "bytes" else len(teacher)
        return Partners(position.masked_fill(mapped != student.labels, -1), most=most)

    def _edit_positions(self, student: Side, teacher: Side) -> Tensor:
        """``[n]``, the teacher position aligned one to one with each student position, or -1."""
        both = [torch.stack([side.labels, side.sequence]) for side in (student, teacher)]
        read = torch.cat(both, 1).cpu().numpy()  # waits for the device once
        sides = read[:, : len(student)], read[:, len(student) :]
        position = np.full(len(student), -1, np.int64)
        for example in np.unique(sides[0][1]):
            (start, stop), (first, last) = (
                np.searchsorted(sequence, [example, example + 1]) for _, sequence in sides
            )
            found = self._edit_example(sides[0][0][start:stop], sides[1][0][first:last])
            position[start:stop] = np.where(found >= 0, found + first, -1)
        return torch.from_numpy(position).to(student.labels.device)

    def _edit_example(self, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        key = (student.tobytes(), teacher.tobytes())
        if key in self._partners:
            self._partners.move_to_end(key)
            return self._partners[key]
        texts = [
            [strings[token] for token in ids]
            for strings, ids in zip(self._strings, (student, teacher), strict=True)
        ]
        self._partners[key] = found = align_tokens(*texts)
        if len(self._partners) > _CACHED_EXAMPLES:
            self._partners.popitem(last=False)
        return found

    def compare(self, pairs: Pairs) -> dict[str, Tensor]:
        with torch.no_grad():
            p = (pairs.teacher / self.temperature).softmax(-1)
            nearest = self.get_buffer("nearest")
            known = nearest >= 0
            moved = torch.zeros_like(pairs.student)
            moved.index_add_(1, nearest.clamp(min=0), p * known)
        each = self.divergence(student_logits=pairs.student / self.temperature, teacher_logits=moved.log())
        return {"min_edit": each}

    def unpaired(self, student_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scaled = student_logits / self.temperature
        return {"min_edit": F.cross_entropy(scaled, labels, ignore_index=-1, reduction="sum")}
