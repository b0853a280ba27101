"""How a step is split over micro-batches matters to the terms that docs/methods.md names alone."""

from __future__ import annotations

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
    torch.manual_seed(0)  # of the projectors
    whole, parts = whole_and_parts(DSKDCrossAttentionObjective(), make_case())
    assert abs(float(whole - parts)) > 1e-5 * abs(float(whole))
    monkeypatch.setattr(cross_model_attention, "_std", lambda values: values.new_tensor(1.7))
    whole, parts = whole_and_parts(DSKDCrossAttentionObjective(), make_case())
    torch.testing.assert_close(whole, parts)


def test_token_alignment_depends_on_the_split() -> None:
    whole, parts = whole_and_parts(DSKDTokenAlignmentObjective(agreement_threshold=0.0), make_case())
    assert abs(float(whole - parts)) > 1e-5 * abs(float(whole))


@pytest.mark.parametrize("everywhere", [False, True])
def test_dskd_v2_depends_on_the_split_by_the_mean_over_agreeing_positions(monkeypatch, everywhere) -> None:
    agreement = DSKDv2Objective._agreement

    def two_in_three(self, projected, student, targets) -> torch.Tensor:
        choices = targets.masked_fill(student.labels % 3 == 0, -2)
        monkeypatch.setattr(dskd_v2, "token_argmax", lambda hidden, head: choices)
        return agreement(self, projected, student, targets)

    monkeypatch.setattr(DSKDv2Objective, "_agreement", two_in_three)
    objective = DSKDv2Objective(ReverseKL(), agreement_threshold=0.0 if everywhere else 1.0)
    whole, parts = whole_and_parts(objective, make_case(kinds=(("bpe", 400), ("bpe", 400))))
    difference = abs(float(whole - parts)) / abs(float(whole))
    assert difference < 1e-9 if everywhere else difference > 1e-5
