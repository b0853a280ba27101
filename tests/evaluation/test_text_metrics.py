from __future__ import annotations

import json
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.metrics import (
    DistinctN,
    ExactMatch,
    ResponseLength,
    RougeL,
    exact_match,
)
from dskd_lightning.evaluation.rouge import rouge_l

SCORER = RougeScorer(["rougeL"], use_stemmer=True)


def pseudo_response(text: str, rng: random.Random) -> str:
    words = [word for word in text.split() if rng.random() > 0.2]
    for _ in range(len(words) // 4):
        words.insert(
            rng.randrange(len(words) + 1), rng.choice(["the", "running", "models", "Paris.", "日本"])
        )
    return " ".join(words)


def test_rouge_equals_rouge_score_on_every_example(data_dir) -> None:
    rng = random.Random(0)
    lines = (data_dir / "self-inst" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    outputs = [json.loads(line)["output"] for line in lines]
    metric = RougeL()
    total = 0.0
    for i, output in enumerate(outputs):
        references = [*([output] if isinstance(output, str) else output), outputs[i - 1]]
        response = pseudo_response(references[0], rng)
        expected = SCORER.score_multi(references, response)["rougeL"].fmeasure
        assert rouge_l(response, references) == expected
        metric.update([response], [references])
        total += expected
    assert len(outputs) > 200
    assert float(metric.compute()) == pytest.approx(100 * total / len(outputs), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="ab cd.runing\n", max_size=40),
    st.lists(st.text(alphabet="ab cdrunig", max_size=40), min_size=1, max_size=3),
)
def test_rouge_equals_rouge_score_on_anything(response, references) -> None:
    assert rouge_l(response, references) == SCORER.score_multi(references, response)["rougeL"].fmeasure


def test_rouge_without_references() -> None:
    with pytest.raises(UserError, match="at least one reference"):
        rouge_l("a", [])
    with pytest.raises(UserError, match="2 predictions but 1"):
        RougeL().update(["a", "b"], [["a"]])


def test_exact_match_normalises() -> None:
    assert exact_match(" The  Cat, sat!", ["a dog", "the cat sat"]) == 1.0
    assert exact_match("the cat", ["cat"]) == 0.0
    metric = ExactMatch()
    metric.update(["a", "b", "c", "d"], [["A."], ["x"], ["x"], ["x"]])
    assert float(metric.compute()) == 25.0


def test_distinct_n_and_length() -> None:
    metric = DistinctN(2)
    metric.update(["word"])
    assert float(metric.compute()) == 0.0
    metric.update(["a b a b", "a b", "x"])
    assert float(metric.compute()) == pytest.approx(2 / 4)
    length = ResponseLength()
    length.update([4, 0], [True, False])
    assert {k: float(v) for k, v in length.compute().items()} == {
        "response_tokens": 2.0, "empty_share": 0.5, "unfinished_share": 0.5,
    }  # fmt: skip


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rouge, distinct = RougeL(), DistinctN(1)
    if rank == 0:  # the other rank has seen nothing
        rouge.update(["a b", "c d", "e f"], [["a b"], ["c x"], ["y z"]])
        distinct.update(["a b a"])
    values = [float(metric.compute()) for metric in (rouge, distinct)]
    distinct.update(["a c"])
    values.append(float(distinct.compute()))
    torch.save(values, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_metrics_add_up_over_ranks(tmp_path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        rouge, distinct, more = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert rouge == pytest.approx(50.0)
        assert distinct == pytest.approx(2 / 3)
        assert more == pytest.approx(3 / 7)
