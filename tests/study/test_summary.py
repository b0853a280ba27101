"""The table of a study: numbers, costs, and what became of variants that weren't tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dskd_lightning.files import write_object
from dskd_lightning.study import worker
from dskd_lightning.study.summary import summarise

COSTS = {"parameters": 1000, "decode_tokens_per_second": 50.04, "peak_bytes": 2**29, "device": "cpu"}


def write_run(folder: Path, result: dict[str, Any], **files: dict[str, Any]) -> None:
    folder.mkdir()
    write_object(folder / worker.DONE, result)
    for name, values in files.items():
        write_object(folder / f"{name}.json", values)


def test_the_table_tells_what_became_of_every_variant(tmp_path) -> None:
    write_run(tmp_path / "a", {"test": {"perplexity_per_byte": 1.5}})
    outcomes = {"b": "diverged", "c": "failed"}
    summarise(tmp_path, {name: tmp_path / name for name in "abc"}, outcomes=outcomes)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table == [
        "|  | per byte | outcome |", "|---|---:|---:|",
        "| a | 1.500 |  |", "| b |  | diverged |", "| c |  | failed |",
    ]  # fmt: skip
    rows = json.loads((tmp_path / "table.json").read_text())
    assert rows == {
        "a": {"perplexity_per_byte": 1.5},
        "b": {"outcome": "diverged"},
        "c": {"outcome": "failed"},
    }


def test_cost_stands_beside_quality(tmp_path) -> None:
    write_run(tmp_path / "teacher", {"test": {"rougeL": 40.0}}, efficiency={**COSTS, "parameters": 2000000})
    training = {"seconds": 12.4, "peak_bytes": 2**30}
    write_run(tmp_path / "a", {"test": {"rougeL": 30.0}, "training": training}, efficiency=COSTS)
    write_run(tmp_path / "b", {"test": {"rougeL": 20.0}}, efficiency={**COSTS, "peak_bytes": None})
    summarise(tmp_path, {name: tmp_path / name for name in ("teacher", "a", "b")})
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == "|  | ROUGE-L | training s | training GiB | parameters | tokens/s | inference GiB |"
    assert table[2:] == [
        "| teacher | 40.0 |  |  | 2,000,000 | 50.0 | 0.50 |",
        "| a | 30.0 | 12 | 1.0 | 1,000 | 50.0 | 0.50 |",
        "| b | 20.0 |  |  | 1,000 | 50.0 |  |",
    ]
    row = json.loads((tmp_path / "table.json").read_text())["a"]
    assert row["inference_peak_gib"] == 0.5


def test_a_teacher_that_runs_have_measured_has_a_row(tmp_path) -> None:
    teacher = {**COSTS, "parameters": 5000}
    write_run(tmp_path / "a", {"test": {"rougeL": 30.0}}, efficiency=COSTS, teacher_efficiency=teacher)
    summarise(tmp_path, {"a": tmp_path / "a"})
    rows = json.loads((tmp_path / "table.json").read_text())
    assert list(rows) == ["teacher", "a"]
    assert rows["teacher"] == {
        "parameters": 5000, "decode_tokens_per_second": 50.04, "inference_peak_gib": 0.5
    }  # fmt: skip
