"""How a step is split over micro-batches matters to the terms that docs/methods.md names alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cross_tokenizer_cases import make_case, one_example

from dskd_lightning.alignment import cross_model_attention
from dskd_lightning.functional import ReverseKL
from dskd_lightning.objectives import dskd_v2
from dskd_lightning.objectives.dskd_cma import DSKDCrossAttentionObjective
from dskd_lightning.objectives.dskd_eta import DSKDTokenAlignmentObjective
from dskd_lightning.objectives.dskd_v2 import DSKDv2Objective

ROOT = Path(__file__).parents[2]


def whole_and_parts(objective, case) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch of three, and the sum of its examples' losses as micro-batches of one."""
    whole = case.run(objective).loss.detach()
    return whole, sum(one_example(case, b).run(objective, configure=False).loss.detach() for b in range(3))


def difference(objective, **case) -> float:
    """How far a split step is from the whole one, relative to it: the largest of three draws.

    The draws' loudness differs by example, so that what one example and the batch are divided by do too.
    """
    differences = []
    for seed in range(3):
        torch.manual_seed(seed)  # of the projectors
        drawn = make_case(seed=seed, **case)
        louder = drawn.teacher.hidden * (1 + 3 * drawn.teacher.sequence)[:, None]
        drawn = replace(drawn, teacher=replace(drawn.teacher, hidden=louder))
        whole, parts = whole_and_parts(objective(), drawn)
        differences.append(float(abs(whole - parts) / abs(whole)))
    return max(differences)


def test_the_documents_say_so() -> None:
    methods = " ".join((ROOT / "docs/methods.md").read_text(encoding="utf-8").split())
    assert (
        "ETA's per-pair means are scaled by tokens over pairs of each batch, and v2's mean over agreeing "
        "positions and the attention's standard deviations are per micro-batch, so these terms depend on how "
        "a step is split"
    ) in methods
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "but for terms that the papers define by micro-batch ([docs/methods.md]" in readme


def test_cross_model_attention_depends_on_the_split_by_its_standard_deviations_alone(monkeypatch) -> None:
    assert difference(DSKDCrossAttentionObjective) > 1e-5
    monkeypatch.setattr(cross_model_attention, "_std", lambda values: values.new_tensor(1.7))
    assert difference(DSKDCrossAttentionObjective) < 1e-9


def test_token_alignment_depends_on_the_split() -> None:
    assert difference(partial(DSKDTokenAlignmentObjective, agreement_threshold=0.0)) > 1e-5


@pytest.mark.parametrize("everywhere", [False, True])
def test_dskd_v2_depends_on_the_split_by_the_mean_over_agreeing_positions(monkeypatch, everywhere) -> None:
    agreement = DSKDv2Objective._agreement

    def two_in_three(self, projected, student, targets) -> torch.Tensor:
        choices = targets.masked_fill(student.labels % 3 == 0, -2)
        monkeypatch.setattr(dskd_v2, "token_argmax", lambda hidden, head: choices)
        return agreement(self, projected, student, targets)

    monkeypatch.setattr(DSKDv2Objective, "_agreement", two_in_three)
    objective = partial(DSKDv2Objective, ReverseKL(), agreement_threshold=0.0 if everywhere else 1.0)
    far = difference(objective, kinds=(("bpe", 400), ("bpe", 400)))
    assert far < 1e-9 if everywhere else far > 1e-5
