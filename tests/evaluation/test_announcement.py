"""What is said before responses are generated: how many, how many are there, the most tokens."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dskd_lightning.evaluation.announcement import announce
from dskd_lightning.evaluation.predict import told_by_seed
from dskd_lightning.evaluation.writer import PredictionWriter
from dskd_lightning.generation.generator import GenerationSettings
from dskd_lightning.runs.heartbeat import Progress
from dskd_lightning.runs.predictions import Prediction

PROMPTS = [[1] * length for length in (2, 4, 9, 3)]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "dskd_lightning")
    return caplog


def answer(path: Path, *indices: int) -> PredictionWriter:
    with PredictionWriter(path) as writer:
        writer.append([Prediction(index, "", (), "yes") for index in indices])
    return writer


def test_everything_is_to_be_generated(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    announce(PROMPTS, tmp_path / "new", (1, 2), GenerationSettings(max_new_tokens=500))
    announce(PROMPTS, tmp_path / "new", (None,), GenerationSettings(max_new_tokens=500))
    assert said.messages == [
        "Responses to 4 prompts, 2 seeds: 8 to generate; at most 4,000 tokens.",
        "Responses to 4 prompts, greedy: 4 to generate; at most 2,000 tokens.",
    ]


def test_what_is_there_is_counted_and_lengths_bound_the_tokens(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    answer(tmp_path / "seed_1.jsonl", 0, 1, 2, 3).finish(range(4))
    answer(tmp_path / "seed_2.jsonl", 2)
    with (tmp_path / "seed_2.jsonl.partial-1").open("w") as cut:
        cut.write('{"index": 3, "pro')
    settings = GenerationSettings(max_new_tokens=7, max_length=10)
    said.clear()
    announce(PROMPTS, tmp_path, (1, 2, None), settings)
    announce(PROMPTS, tmp_path, (1,), settings)
    assert said.messages == [
        f"Responses to 4 prompts, 3 seeds: 7 to generate, 5 of 12 are in '{tmp_path}'; at most 41 tokens.",
        f"Responses to 4 prompts, 1 seed: all 4 are in '{tmp_path}'.",
    ]
    assert 41 == (7 + 7 + 6) + (7 + 7 + 6 + 1)


def test_the_first_batch_of_a_seed_is_told_at_once(said: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    report = told_by_seed(Progress("Responses", 4, "prompts", clock=lambda: now[0]))
    for seed in (1, None):
        for done in range(5):
            report(seed, done, 4)
            now[0] += 5
    assert said.messages == [
        "Responses of seed 1: 1 of 4 prompts (25%), 0.2 a second, 15 s left",
        "Responses of seed 1: 4 of 4 prompts (100%), 0.2 a second, 0 s left",
        "Greedy responses: 1 of 4 prompts (25%), 0.2 a second, 15 s left",
        "Greedy responses: 4 of 4 prompts (100%), 0.2 a second, 0 s left",
    ]
