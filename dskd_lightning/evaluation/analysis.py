"""What a trained pair looks like inside: representation distances, projectors, alignments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dskd_lightning.alignment.cross_model_attention import CrossModelAttention
from dskd_lightning.alignment.exact import ExampleAlignment
from dskd_lightning.alignment.token_bytes import token_bytes, token_text
from dskd_lightning.evaluation.representation import (
    cosine_structure_distance,
    inner_product_structure_distance,
    linear_cka,
)
from dskd_lightning.functional.spectrum import effective_rank, singular_values
from dskd_lightning.projection import LinearProjector
from dskd_lightning.ranks import whole
from dskd_lightning.structures import Alignment, DistillationBatch, Side

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["TokenMap", "projector_spectra", "representation_distances", "token_maps"]


@dataclass(frozen=True)
class TokenMap:
    """How the response tokens of one example meet across two tokenizers.

    Args:
        student: ``n`` token texts, printable.
        teacher: ``m`` token texts.
        groups: the byte-exact groups of these tokens.
        attention: ``[n, m]``, what cross-model attention puts where; None for other objectives.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    groups: ExampleAlignment
    attention: npt.NDArray[np.float32] | None


@torch.no_grad()
def representation_distances(
    module: DistillationModule, batches: Iterable[DistillationBatch]
) -> dict[str, float]:
    """Distances between the student's and the first teacher's hidden states at response tokens.

    Across tokenizers only exactly aligned pairs are compared.

    Args:
        module: with its models built.
        batches: on the models' device.

    Returns:
        ``structure_distance_cosine`` and ``structure_distance_inner_product``, means over responses
        of at least two tokens; ``cka`` over all their tokens; ``representation_tokens``, how many
        those are. Empty where no response has two tokens.
    """
    students, teachers, cosine, inner = [], [], [], []
    for batch in batches:
        if not batch.answers(0):
            continue
        student, teacher, alignment = _sides(module, batch)
        rows_s = torch.arange(len(student), device=student.hidden.device)
        rows_t = rows_s
        if alignment is not None:
            rows_s, rows_t = alignment.pairs.unbind(1)
        for example in range(len(batch)):
            own = student.sequence[rows_s] == example
            if int(own.sum()) < 2:
                continue
            x = student.hidden[rows_s[own]].float().cpu()
            y = teacher.hidden[rows_t[own]].float().cpu()
            cosine.append(float(cosine_structure_distance(x, y)))
            inner.append(float(inner_product_structure_distance(x, y)))
            students.append(x)
            teachers.append(y)
    if not students:
        return {}
    x, y = torch.cat(students), torch.cat(teachers)
    return {
        "structure_distance_cosine": sum(cosine) / len(cosine),
        "structure_distance_inner_product": sum(inner) / len(inner),
        "cka": float(linear_cka(x, y)),
        "representation_tokens": float(len(x)),
    }


def projector_spectra(module: DistillationModule) -> dict[str, dict[str, Any]]:
    """``effective_rank`` and descending ``singular_values`` of every trained matrix of the objectives."""
    weights: dict[str, Tensor] = dict(module.objectives.named_parameters())
    for name, part in module.objectives.named_modules():
        if isinstance(part, LinearProjector):
            weights[f"{name}.weight"] = part.matrix
    weights = {name: whole(weight) for name, weight in weights.items()}
    return {
        name: {
            "effective_rank": float(effective_rank(weight)),
            "singular_values": singular_values(weight).tolist(),
        }
        for name, weight in weights.items()
        if weight.ndim == 2 and min(weight.shape) > 1
    }


@torch.no_grad()
def token_maps(
    module: DistillationModule, batch: DistillationBatch, teacher_tokenizer: Any
) -> list[TokenMap]:
    """One map per example of the batch; none where both models read the same tokens.

    Args:
        module: with its models built.
        batch: on the models' device.
        teacher_tokenizer: of the first teacher.
    """
    if batch.alignments[0] is None or not batch.answers(0):  # before the models run
        return []
    student, teacher, alignment = _sides(module, batch)
    assert alignment is not None
    attention = _attention(module, student, teacher, alignment)
    maps = []
    for example in range(len(batch)):
        rows, columns = (side.sequence == example for side in (student, teacher))
        n, m = int(rows.sum()), int(columns.sum())
        if not n or not m:
            continue
        maps.append(
            TokenMap(
                _texts(module.tokenizer, student.labels[rows]),
                _texts(teacher_tokenizer, teacher.labels[columns]),
                _groups(alignment, rows, columns),
                None if attention is None else attention[example, :n, :m].float().cpu().numpy(),
            )
        )
    return maps


def _sides(module: DistillationModule, batch: DistillationBatch) -> tuple[Side, Side, Alignment | None]:
    student = module.student_side(batch.student)
    hidden = batch.teacher_hidden[0] if batch.teacher_hidden else None
    return student, module.teacher_side(0, batch.teachers[0], hidden), batch.alignments[0]


def _attention(
    module: DistillationModule, student: Side, teacher: Side, alignment: Alignment
) -> Tensor | None:
    """``[examples, n_max, m_max]`` of the first teacher's cross-model attention."""
    objective = cast("torch.nn.ModuleList", module.objectives)[0]
    for part in objective.modules():
        # Statistics of the padded layout scale all scores alike and are not kept outside training.
        if isinstance(part, CrossModelAttention) and not part.needs_padded_statistics:
            return part(student, teacher, alignment).t2s
    return None


def _texts(tokenizer: Any, ids: Tensor) -> tuple[str, ...]:
    pieces = token_bytes(tokenizer).pieces
    return tuple(token_text(pieces[index]) if pieces[index] else f"<{index}>" for index in ids.tolist())


def _groups(alignment: Alignment, rows: Tensor, columns: Tensor) -> ExampleAlignment:
    """The part of a batch's alignment that one example's positions make."""
    first_row, first_column = (int(mask.nonzero()[0]) for mask in (rows, columns))
    pairs = alignment.pairs[rows[alignment.pairs[:, 0]]]
    pairs = pairs - pairs.new_tensor([[first_row, first_column]])
    student, teacher = alignment.student_group[rows], alignment.teacher_group[columns]
    present = torch.cat([student, teacher])
    present = present[present >= 0]
    first = int(present.min()) if len(present) else 0
    count = int(present.max()) + 1 - first if len(present) else 0

    def ints(values: Tensor) -> npt.NDArray[np.int32]:
        return values.cpu().numpy().astype(np.int32)

    def local(groups: Tensor) -> npt.NDArray[np.int32]:
        return ints(torch.where(groups >= 0, groups - first, groups))

    ends: Sequence[Tensor] = (alignment.student_end[rows], alignment.teacher_end[columns])
    return ExampleAlignment(local(student), local(teacher), ints(ends[0]), ints(ends[1]), ints(pairs), count)
