"""What is measured of a model's layers is measured once for the same weights, text and choice."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from conftest import make_model

from dskd_lightning import PruneSpec
from dskd_lightning.models.layer_measurements import LayerMeasurements, measured_once
from dskd_lightning.structures import TokenBatch

FOUND = LayerMeasurements((2, 0), (0.25, None, 0.125), 1.5, 2.5)


def batch(token: int = 1, labels: int = 2, pad: int = 1) -> TokenBatch:
    ids = torch.full((1, 4), token)
    where = torch.arange(4)
    mask = torch.tensor([[1, 1, 1, pad]])
    return TokenBatch(ids, torch.full((1, 4), labels), mask, where[None], where, torch.zeros(4).long())


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """How often something was measured; nothing is kept yet."""
    monkeypatch.setenv("DSKD_CACHE_DIR", str(tmp_path / "cache"))
    calls = []

    def ask(model, prune=None, batches=None) -> LayerMeasurements:
        def measure() -> LayerMeasurements:
            calls.append(1)
            return FOUND

        assert measured_once(model, prune or PruneSpec(layers=1), batches or [batch()], measure) == FOUND
        return len(calls)

    return ask


@pytest.fixture
def model():
    torch.manual_seed(0)
    return make_model(20, hidden=8, layers=3).eval()


def test_the_same_is_measured_once(asked, model, tmp_path) -> None:
    assert [asked(model) for _ in range(3)] == [1, 1, 1]
    (file,) = (tmp_path / "cache" / "layers").iterdir()
    assert json.loads(file.read_text())["scores"] == [0.25, None, 0.125]  # whatever reads JSON


def test_another_weight_text_or_choice_is_measured(asked, model) -> None:
    asked(model)
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1
    assert asked(model) == 2
    assert asked(model, PruneSpec(layers=2)) == 3
    assert asked(model, PruneSpec(layers=1, by="perplexity")) == 4
    for number, text in enumerate([batch(token=3), batch(labels=3), batch(pad=0)], 5):
        assert asked(model, batches=[text]) == number
    assert asked(model, batches=[batch(), batch()]) == 8
    assert asked(model, batches=[batch(pad=0)]) == 8
    with torch.autocast("cpu", torch.bfloat16):  # whose scores are others
        assert asked(model) == 9
    assert asked(model) == 9


@pytest.mark.parametrize(
    "damage", ["", "{}", '{"dropped": [2, 0], "scores": [0.5], "before": 1.0, "after": 1.0}']
)
def test_what_is_damaged_is_measured_anew(asked, model, tmp_path, caplog, damage: str) -> None:
    asked(model)
    (file,) = (tmp_path / "cache" / "layers").iterdir()
    file.write_text(damage)
    with caplog.at_level(logging.WARNING, logger="dskd_lightning"):
        assert asked(model) == 2
    assert f"{file}: " in caplog.text
    assert "the layers are measured anew" in caplog.text
    assert asked(model) == 2


def test_where_nothing_can_be_kept_it_is_said(asked, model, tmp_path, caplog) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    with caplog.at_level(logging.WARNING, logger="dskd_lightning"):
        assert asked(model) == 1
    assert "aren't kept" in caplog.text
    assert asked(model) == 2
