"""X-Token's product without sparse tensors, as on a Mac's GPU."""

from __future__ import annotations

import pytest
import torch
from cross_tokenizer_cases import make_case

from dskd_lightning import XTokenProjectionObjective


def test_the_dense_product_is_the_sparse_one(request: pytest.FixtureRequest, monkeypatch) -> None:
    found = []
    for poor in (False, True):
        if poor:
            request.getfixturevalue("poor_device")
        case = make_case()
        objective = XTokenProjectionObjective()
        loss = case.run(objective).loss
        if poor:
            monkeypatch.setattr(torch.sparse, "mm", None)  # it must not be reached
            loss = case.run(objective, configure=False).loss
        found.append([loss.detach(), *case.gradients(loss)])
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(dense, sparse)
