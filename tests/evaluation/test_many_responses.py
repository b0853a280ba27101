"""Responses to many prompts: memory holds the prompts and a batch, and the scores are what they were."""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import make_tokenizer

from dskd_lightning.callbacks.responses import response_scores
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.evaluation.predict import PromptRecord, check_settings, predict
from dskd_lightning.evaluation.response_data import prompt_records, samples_folder, write_response_data
from dskd_lightning.evaluation.response_parts import answer_part
from dskd_lightning.generation.filtering import Candidate, ResponseFilter
from dskd_lightning.generation.generator import Generation, GenerationSettings
from dskd_lightning.runs.parts import Part
from dskd_lightning.runs.predictions import Prediction

MANY, LONG = 500, 12_000
SEEDS = (1, 2)
LIMIT = 3 * MANY * LONG // 5  # less than a third of the responses' letters


class Stub:
    """Long answers without a model."""

    settings = GenerationSettings(max_new_tokens=4, batch_size=8)

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, seed: int, indices: Sequence[int]
    ) -> Iterator[list[Generation]]:
        for start in range(0, len(indices), 8):
            some = indices[start : start + 8]
            yield [Generation(at, f"{seed} {at} ".ljust(LONG, "x") + ".", (1, 2), 0) for at in some]


def records() -> list[PromptRecord]:
    return [PromptRecord(at, f"prompt {at}", [at, 1], (f"\u00e4 {at}", "b")) for at in range(MANY)]


def peak(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_responses_are_not_held(tmp_path: Path) -> None:
    asked = records()

    def run() -> None:
        found = predict(Stub(), asked, tmp_path, model_id="m", seeds=SEEDS)  # type: ignore[arg-type]
        assert [[p.index for p in stored] for stored in found.values()] == [[*range(MANY)]] * 2

    assert peak(run) < LIMIT  # generated, put together and read
    assert peak(run) < LIMIT  # found on the disk
    (tmp_path / "seed_1.jsonl").rename(tmp_path / "seed_1.jsonl.partial-0")
    assert peak(run) < LIMIT  # put together by a run that goes on


def test_scoring_holds_no_texts() -> None:
    def answers(seed: int, many: int) -> Iterator[Prediction]:
        draw = random.Random(seed)
        for at in range(many):
            yield Prediction(at, "", (f"{at} " + "abcd efgh ijkl mnop " * 20,), draw.choice("abc"), seed, 1)

    few, many = (
        peak(lambda: response_scores({seed: answers(seed, count) for seed in SEEDS}))  # noqa: B023
        for count in (2_500, 6_000)
    )
    assert many < few + 1_500_000


def test_training_data_are_written_without_holding_them(tmp_path: Path) -> None:
    renderer = ChatRenderer(make_tokenizer())
    examples = [Example((Message("user", f"say {at}"),), source="data", line=at) for at in range(MANY)]
    output = tmp_path / "out.jsonl"
    keep = ResponseFilter()
    given = {"model_id": "m", "seeds": SEEDS}

    def run() -> None:
        meta = write_response_data(
            Stub(), renderer, examples, output, SEEDS, keep, {}, model_id="m"  # type: ignore[arg-type]
        )  # fmt: skip
        assert (meta["kept"], meta["responses"], meta["dropped"]) == (2 * MANY, 2 * MANY, {})

    assert peak(run) < LIMIT
    lines = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    said = [(turns[0]["content"], turns[1]["content"].split()[:2]) for turns in lines]
    assert said == [(f"say {at}", [str(seed), str(at)]) for at in range(MANY) for seed in SEEDS]
    output.unlink()
    for number in (1, 2):
        part = Part(number, 2)
        answer_part(Stub(), prompt_records(renderer, examples), samples_folder(output), part, **given)  # type: ignore[arg-type]
    assert peak(run) < LIMIT  # put together from parts
    assert [json.loads(line)["messages"] for line in output.read_text().splitlines()] == lines


def test_candidates_are_filtered_a_prompt_at_a_time_as_all_at_once() -> None:
    found = [
        Candidate(prompt, text, len(text), bool(prompt % 3), nll)
        for prompt in range(9)
        for text, nll in (("ab", 2.0), ("", 1.0), ("ab", 0.5), ("c", 1.5), ("def", prompt / 2), ("gh", None))
    ]
    keep = ResponseFilter(finished=True, min_tokens=2, max_nll=3.0, likeliest=2)
    dropped = Counter[str]()
    wanted, reasons = keep(found)
    assert list(keep.by_prompt(iter(found), dropped)) == wanted
    assert dropped == reasons


def test_the_prompts_of_folders_that_exist_are_known_again(tmp_path: Path) -> None:
    for asked in (records(), records()[:1], []):
        whole = json.dumps([[r.index, list(r.ids), *r.references] for r in asked]).encode()
        found = check_settings(Stub(), asked, tmp_path / "none", "m")  # type: ignore[arg-type]
        assert found["prompts"] == hashlib.sha256(whole).hexdigest()


def test_scores_are_added_up_from_predictions_that_come_once() -> None:
    texts = ["a b c", "b c d e", "", "x y z", "c a b"]
    found = [
        Prediction(at, "", ("a b c", "y z"), texts[at % 5], 1, at % 7, bool(at % 3)) for at in range(2_500)
    ]
    scores = response_scores({1: iter(found), 2: iter(found[:1_000])})
    first, second = (response_scores({None: some}) for some in (found, found[:1_000]))
    for name, value in first.items():
        assert scores[name] == pytest.approx((value + second[name]) / 2)
    assert first["response_tokens"] == pytest.approx(sum(p.tokens for p in found) / 2_500)
    assert first["exact_match"] == pytest.approx(20.0)
