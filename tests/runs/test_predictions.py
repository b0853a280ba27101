from __future__ import annotations

import pytest

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.writer import PredictionWriter
from dskd_lightning.files import write_atomic
from dskd_lightning.runs.predictions import Prediction, describe_problems, read_predictions

LINE = '{"index": 0, "prompt": "", "references": [], "response": "", %(more)s}'


def prediction(index: int, response: str = "yes\u2028no", **values) -> Prediction:
    return Prediction(index, f"prompt {index}", ("yes",), response, 10, 3, **values)


def write(path, *predictions) -> None:
    path.write_text("".join(p.to_json() + "\n" for p in predictions), encoding="utf-8")


def test_round_trip_sorted_by_index(tmp_path) -> None:
    with (
        PredictionWriter(tmp_path / "a.jsonl", rank=0) as first,
        PredictionWriter(tmp_path / "a.jsonl", rank=1) as second,
    ):
        first.append([prediction(2)])
        second.append([prediction(0), prediction(1)])
        finished = first.finish([0, 1, 2])
    assert finished == read_predictions(tmp_path / "a.jsonl", [0, 1, 2]) == [prediction(i) for i in range(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_finish_keeps_the_parts_when_one_is_missing(tmp_path) -> None:
    with PredictionWriter(tmp_path / "a.jsonl") as writer:
        writer.append([prediction(0)])
        with pytest.raises(UserError, match=r"1 of 2 predictions are missing \(index 1\)"):
            writer.finish([0, 1])
    assert not (tmp_path / "a.jsonl").exists()
    assert PredictionWriter(tmp_path / "a.jsonl").done.keys() == {0}


def test_an_index_is_written_once(tmp_path) -> None:
    with PredictionWriter(tmp_path / "a.jsonl") as writer:
        writer.append([prediction(0)])
        with pytest.raises(UserError, match="answered twice"):
            writer.append([prediction(0)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.partial-0"])
def test_a_changed_letter_of_a_response_is_seen(tmp_path, name) -> None:
    write(tmp_path / name, prediction(0), prediction(1, "good"))
    path = tmp_path / name
    path.write_text(path.read_text().replace("good", "food"))
    with pytest.raises(UserError, match=rf"{name}:2: isn't as it was written .* delete the file"):
        PredictionWriter(tmp_path / "a.jsonl") if "partial" in name else read_predictions(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no predictions"),
        ("{", ":1: not a prediction"),
        ('{"index": 1}', ":1: not a prediction"),
        ("[1]", ":1: not a prediction"),
        ('{"index": 1, "prompt": 3, "references": [], "response": ""}', "must be an integer; prompt"),
        (LINE % {"more": '"tokens": "x"'}, "must be an integer"),
        (LINE % {"more": '"tokens": 1' + "0" * 400}, "must be an integer"),
        (LINE % {"more": '"tokens": 1' + "0" * 5000}, ":1: not a prediction"),
        (LINE % {"more": '"seed": [1]'}, "must be an integer"),
        (LINE % {"more": '"finished": "no"'}, "finished true or false"),
        (LINE % {"more": '"fields": []'}, "fields an object"),
        ('{"index": 0, "prompt": "", "references": "abc", "response": ""}', "references must be a list"),
        ("[" * 100_000, ":1: not a prediction"),
    ],
    ids=lambda value: value[:50],
)
def test_malformed_files(tmp_path, lines, message) -> None:
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        read_predictions(tmp_path / "a.jsonl")


def test_duplicates_missing_and_unknown(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, prediction(0), prediction(0), prediction(1))
    with pytest.raises(UserError, match=r"more than once \(index 0\)"):
        read_predictions(path)
    write(path, prediction(0), prediction(5))
    with pytest.raises(UserError, match="missing"):
        read_predictions(path, [0, 1])
    with pytest.raises(UserError, match="belong to no prompt"):
        read_predictions(path, [0])


def test_empty_and_endless_responses_are_named() -> None:
    assert describe_problems([prediction(0)]) == []
    empty, endless = describe_problems([prediction(0, " "), prediction(1, finished=False), prediction(2)])
    assert empty.startswith("1 of 3 responses are empty")
    assert endless.startswith("1 of 3 responses hit the length limit")


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path, monkeypatch) -> None:
    write_atomic(tmp_path / "a", "old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
