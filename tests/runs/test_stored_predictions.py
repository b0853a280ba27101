"""Predictions read from their file one at a time: the same ones, checked as strictly, held by nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.writer import PredictionWriter
from dskd_lightning.runs.predictions import Prediction, read_predictions
from dskd_lightning.runs.stored_predictions import StoredPredictions


def prediction(index: int, response: str = "j\u00e4\u2028no") -> Prediction:
    return Prediction(index, f"prompt {index}", ("yes",), response, 10, 3, fields={"id": index})


def write(path: Path, *indices: int, between: str = "\n") -> Path:
    text = "".join(prediction(index).to_json() + between for index in indices)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_sequence_by_index_whatever_the_order_of_the_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 3, 0, 2, 1, between="\n\n")
    stored, whole = StoredPredictions(path, range(4)), read_predictions(path, range(4))
    assert stored == whole
    assert whole == stored == StoredPredictions(path)
    assert list(stored) == list(stored) == whole
    assert stored.indices.tolist() == [0, 1, 2, 3]
    assert [stored[at] for at in (0, 3, -1)] == [whole[0], whole[3], whole[3]]
    assert stored[1:3] == whole[1:3]
    assert stored[::-2] == whole[::-2]
    assert stored != whole[:3]
    assert stored != [*whole[:3], prediction(3, "other")]
    assert stored != "text"
    assert stored != 3
    with pytest.raises(IndexError):
        stored[4]


def test_what_is_missing_doubled_or_changed_is_seen_when_the_file_is_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 0, 2, 2)
    with pytest.raises(UserError, match=r"more than once \(index 2\)"):
        StoredPredictions(path)
    write(path, 0, 2)
    with pytest.raises(UserError, match=r"1 of 3 predictions are missing \(index 1\)"):
        StoredPredictions(path, range(3))
    with pytest.raises(UserError, match=r"1 predictions belong to no prompt \(index 2\)"):
        StoredPredictions(path, [0])
    path.write_bytes(path.read_bytes().replace(b"no", b"so"))
    with pytest.raises(UserError, match=r"a.jsonl:1: isn't as it was written"):
        StoredPredictions(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a.jsonl:1: isn't"):
        StoredPredictions(path)
    for content, message in (
        (b"", "holds no predictions"),
        (b"\xff\n", "cannot be read"),
        (b"{", ":1: not a"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            StoredPredictions(path)
    with pytest.raises(UserError, match="cannot be read"):
        StoredPredictions(tmp_path / "none.jsonl")


def test_a_change_after_the_file_was_opened_is_seen_when_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 0, 1)
    stored = StoredPredictions(path)
    path.write_bytes(path.read_bytes()[:-10] + b"3" * 10)
    assert stored[0] == prediction(0)
    with pytest.raises(UserError, match=r"a.jsonl, the line at byte \d+: "):
        list(stored)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        stored[0]


@pytest.mark.parametrize("cut", [9, 1 << 16, (1 << 16) + 1, 200_000])
def test_a_line_that_was_cut_off_is_overwritten_however_long_it_is(tmp_path: Path, cut: int) -> None:
    partial = write(tmp_path / "a.jsonl.partial-0", 1)
    with partial.open("a") as stream:
        stream.write("x" * cut)
    with PredictionWriter(tmp_path / "a.jsonl") as writer:
        assert list(writer.done) == [1]
        writer.append([prediction(0)])
        assert isinstance(writer.finish([0, 1]), StoredPredictions)
    assert (tmp_path / "a.jsonl").read_text() == write(tmp_path / "b.jsonl", 0, 1).read_text()


def test_a_file_of_nothing_but_a_cut_off_line_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.partial-0").write_text("x" * 70_000)
    with PredictionWriter(tmp_path / "a.jsonl") as writer:
        writer.append([prediction(0)])
        assert writer.finish([0]) == [prediction(0)]
