from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dskd_lightning.data.examples import Message
from dskd_lightning.data.formats import InvalidRecord, detect_format, parse_record
from dskd_lightning.data.json_stream import iter_json
from dskd_lightning.data.preparation import PreparationSettings
from dskd_lightning.data.reading import read_examples
from dskd_lightning.data.sources import resolve_sources
from dskd_lightning.errors import UserError

CASES = {
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "dolly": {"instruction": "Add.", "context": "1 2", "response": "3", "category": "qa"},
    "prompt": {"prompt": "Add.\n\n1 2", "completion": "3"},
    "messages": {
        "messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Add.\n\n1 2"}, {"from": "gpt", "value": "3"}]},
}


@pytest.mark.parametrize("name", CASES)
def test_each_format_is_detected_and_read_alike(name: str) -> None:
    assert detect_format(CASES[name], "file") == name
    example = parse_record(CASES[name], name, "file", 7)
    assert example.messages == (Message("user", "Add.\n\n1 2"), Message("assistant", "3"))
    assert example.references == ("3",)
    assert example.place == "file:7"
    assert example.response == "3"
    assert example.prompt == (Message("user", "Add.\n\n1 2"),)


def test_ready_made_prompt_field_and_several_references() -> None:
    record = {"instruction": "x", "input": "", "prompt": "### x", "output": ["a", "b", " "]}
    assert detect_format(record, "f") == "alpaca"
    assert parse_record(record, "alpaca", "f", 1).messages[0].content == "x"
    ready = parse_record(record, "prompt", "f", 1)
    assert ready.messages[0].content == "### x"
    assert ready.references == ("a", "b")


def test_system_and_parts_and_surrogates() -> None:
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
            {"role": "assistant", "content": "\ud83d\ude42"},
        ]
    }
    example = parse_record(record, "messages", "f", 1)
    assert example.system == "Be brief."
    assert example.messages[1].content == "Hi!"
    assert example.response == "🙂"
    assert example.with_system("other") is example


@pytest.mark.parametrize(
    ("format", "record", "needle"),
    [
        ("alpaca", {"instruction": "x", "output": "  "}, "no response"),
        ("alpaca", {"instruction": "x", "output": 3}, "neither text"),
        ("alpaca", {"instruction": "", "output": "x"}, "no prompt"),
        ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "no response"),
        ("sharegpt", {"conversations": "x"}, "isn't a list"),
        ("prompt", ["x"], "instead of a JSON object"),
    ],
)
def test_bad_records_name_their_place(format: str, record: object, needle: str) -> None:
    with pytest.raises(InvalidRecord, match=needle) as caught:
        parse_record(record, format, "bad.jsonl", 3)
    assert "bad.jsonl:3" in str(caught.value)


def test_prediction_needs_no_response() -> None:
    example = parse_record({"instruction": "x"}, "alpaca", "f", 1, needs_response=False)
    assert example.response is None
    assert example.prompt == (Message("user", "x"),)


def test_unknown_format_lists_keys() -> None:
    with pytest.raises(UserError, match="question"):
        detect_format({"question": "x"}, "f.jsonl")


RECORDS = [{"instruction": f"é {i}\n", "input": "", "output": "o, " * (i % 50)} for i in range(300)]


def _write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(RECORDS[0]))
            writer.writeheader()
            writer.writerows(RECORDS)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in RECORDS))
    else:
        path.write_text(json.dumps(RECORDS, indent=1))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv"])
def test_every_kind_of_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dskd_lightning.data.json_stream._CHUNK", 37)
    path = _write(tmp_path / f"data{suffix}")
    (source,) = resolve_sources(str(path))
    records = list(source.records())
    assert [r.value for r in records] == RECORDS
    assert all(r.source == str(path) and r.line > 0 for r in records)
    assert (source,) == tuple(resolve_sources(str(tmp_path)))
    before = source.fingerprint()
    path.write_bytes(path.read_bytes() + b"\n")
    assert source.fingerprint() != before


def _pack(path: Path) -> Path:
    """``path`` packed as its last suffix says, the plain file gone."""
    plain = path.with_suffix("")
    _write(plain)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        path.write_bytes(pa.compress(plain.read_bytes(), "zstd", asbytes=True))
    plain.unlink()
    return path


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_packed_files(tmp_path: Path, suffix: str, packed: str) -> None:
    path = _pack(tmp_path / f"data{suffix}{packed}")
    (source,) = resolve_sources(str(tmp_path))
    assert [record.value for record in source.records()] == RECORDS
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"can't be unpacked"):
        list(source.records())
    path.write_bytes(b"plain")
    with pytest.raises(UserError, match=r"can't be unpacked"):
        list(source.records())
    with pytest.raises(UserError, match="doesn't exist"):
        resolve_sources(str(tmp_path / f"none{suffix}{packed}"))


def test_json_object_with_data_and_pretty_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": RECORDS[:3]}, indent=2))
    assert [value for _, value in iter_json(path)] == RECORDS[:3]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1}\n\n{"a": \n', 3),
        ('[\n{"a": 1},\n{"a" 2}\n]', 3),
        ('[{"a": 1}\n{"a": 2}]', 2),
        ('[{"a": 1},', 1),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1000])
def test_malformed_json_names_line(tmp_path: Path, text: str, line: int, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr("dskd_lightning.data.json_stream._CHUNK", chunk)
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"bad\.jsonl:{line} "):
        list(iter_json(path))


def test_saved_dataset(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    (source,) = resolve_sources(str(tmp_path / "saved"))
    assert [r.value for r in source.records()] == RECORDS


def test_missing_and_unreadable_sources(tmp_path: Path) -> None:
    for entry, needle in {
        str(tmp_path / "none.jsonl"): "doesn't exist",
        str(tmp_path): "holds no",
        "./nothing": "doesn't exist",
    }.items():
        with pytest.raises(UserError, match=needle):
            resolve_sources(entry)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="convert"):
        resolve_sources(str(tmp_path / "x.txt"))
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(UserError, match="Parquet"):
        list(resolve_sources(str(tmp_path / "x.parquet"))[0].records())
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="UTF-8"):
        list(resolve_sources(str(tmp_path / "x.jsonl"))[0].records())
    (tmp_path / "x.csv").write_text("a,b\n1,2,3\n")
    with pytest.raises(UserError, match=r"x\.csv:2"):
        list(resolve_sources(str(tmp_path / "x.csv"))[0].records())


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Add.", "input": "1 2", "response": "3"}, ["Add.\n\n1 2"]),
        ({"instruction": "Add.", "context": "1 2", "output": "3"}, ["Add.\n\n1 2"]),
        ({"instruction": "Add.", "input": "", "output": "3", "history": [["a", "b"]]}, ["a", "b", "Add."]),
        ({"system": "S", "messages": CASES["messages"]["messages"]}, ["S", "Add.\n\n1 2"]),
        ({"system": "S", "conversations": CASES["sharegpt"]["conversations"]}, ["S", "Add.\n\n1 2"]),
        ({"messages": CASES["sharegpt"]["conversations"]}, ["Add.\n\n1 2"]),
        ({"conversations": CASES["messages"]["messages"]}, ["Add.\n\n1 2"]),
        ({"chosen": CASES["messages"]["messages"], "rejected": []}, ["Add.\n\n1 2"]),
        ({"prompt": "Add.", "chosen": "3"}, ["Add."]),
        ({"prompt": [{"role": "user", "content": "Add."}], "completion": "3"}, ["Add."]),
        (
            {
                "prompt": [{"role": "user", "content": "Add."}],
                "completion": [{"role": "assistant", "content": "3"}],
            },
            ["Add."],
        ),
    ],
)
def test_every_part_of_a_prompt_is_read(record: dict, prompt: list[str]) -> None:
    unused = Counter[str]()
    example = parse_record(record, detect_format(record, "f"), "f", 1, unused=unused)
    assert [message.content for message in example.prompt] == prompt
    assert (example.response, example.references) == ("3", ("3",))
    assert not unused


def test_fields_without_a_use_are_named_and_counted(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x", "name": "Bob"}, {"role": "assistant", "content": "y"}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"messages": messages, "id": i or None}) + "\n" for i in range(3))
    )
    counts = Counter[str]()
    list(read_examples(resolve_sources(str(tmp_path)), PreparationSettings(), counts))
    file = tmp_path / "a.jsonl"
    assert counts == {
        "read": 3,
        f"unused field 'id' of {file}": 2,
        f"unused field 'messages.name' of {file}": 3,
    }


def test_the_demo_has_no_field_without_a_use() -> None:
    counts = Counter[str]()
    assert len(list(read_examples(resolve_sources("demo"), PreparationSettings(), counts))) == 412
    assert counts == {"read": 412}


def test_a_message_without_role_names_its_keys() -> None:
    record = {"messages": [{"speaker": "user", "content": "x"}]}
    with pytest.raises(InvalidRecord, match="its keys: speaker, content"):
        parse_record(record, "messages", "f", 1)


def test_hidden_files_of_a_folder_are_skipped(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.meta.json", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text("{}\n")
    assert [source.path for source in resolve_sources(str(tmp_path / "f"))] == [tmp_path / "f" / "a.jsonl"]


def test_json_on_one_line_and_beyond_the_limits_of_python(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": RECORDS[:3]}))
    assert [value for _, value in iter_json(path)] == RECORDS[:3]
    path.write_text(json.dumps(RECORDS[0]))
    assert [value for _, value in iter_json(path)] == RECORDS[:1]
    for text in ("[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "1" * 5000 + "}", "[" + "1" * 5000 + "]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.json:1 "):
            list(iter_json(path))


def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/a\xff\x1b.jsonl"
    Path(os.fsdecode(path)).write_text('{"prompt": "a", "response": "b"}\n')
    for entry in (os.fsdecode(path), str(tmp_path)):
        (source,) = resolve_sources(entry)
        assert [record.value["prompt"] for record in source.records()] == ["a"]
        assert source.name.endswith("/a\ufffd\ufffd.jsonl")


FOREIGN = b'{"prompt": "a", "response": "caf\xe9"}'  # Latin-1
FILES = {
    "d.jsonl": b'{"prompt": "a", "response": "b"}\n' + FOREIGN + b'\n{"prompt": "c", "response": "d"}\n',
    "d.json": b'[{"prompt": "a", "response": "b"},\n' + FOREIGN + b',\n{"prompt": "c", "response": "d"}]',
    "d.csv": b"prompt,response\na,caf\xe9\nc,d\na,b\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_line_that_is_not_utf8_is_named_or_skipped(tmp_path: Path, name: str, packed: bool) -> None:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(FILES[name]) if packed else FILES[name])
    (source,) = resolve_sources(str(path))
    with pytest.raises(UserError, match=rf"{name}.*:2 isn't UTF-8 text \(it holds the byte 0xe9\)"):
        list(source.records())
    errors: list[InvalidRecord] = []
    values = [record.value for record in source.records(errors.append)]
    assert sorted(value["response"] for value in values) == ["b", "d"]
    assert [error.reason for error in errors] == ["not UTF-8"]


def test_a_wholly_foreign_file_is_named_at_its_first_line(tmp_path: Path) -> None:
    for name, content in {
        "a.json": '{"data": [\n{"prompt": "a", "response": "é"}]}'.encode("latin-1"),
        "b.json": '{"prompt": "a", "response": "b"}'.encode("utf-16"),
        "c.csv": "prompt,réponse\na,b\n".encode("latin-1"),
    }.items():
        (tmp_path / name).write_bytes(content)
        line = 2 if name == "a.json" else 1
        with pytest.raises(UserError, match=rf"{name}:{line} isn't UTF-8"):
            list(resolve_sources(str(tmp_path / name))[0].records())


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "1 + 1?", "output": "2"},
        {"prompt": "1 + 1?", "responses": ["2", "two"]},
        {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]},
    ],
)
def test_the_record_s_own_reasoning_is_the_answer_s(key: str, record: dict) -> None:
    unused: Counter[str] = Counter()
    example = parse_record({**record, key: "One more."}, detect_format(record, "f"), "f", 1, unused=unused)
    thought = "<think>\nOne more.\n</think>\n\n2"
    assert example.response == thought
    assert example.references == ((thought, "two") if "responses" in record else (thought,))
    assert not unused
    assert not example.fields


def test_an_answer_with_reasoning_of_its_own_keeps_it_and_the_other_is_named() -> None:
    unused: Counter[str] = Counter()
    record = {"prompt": "a", "response": "<think>x</think>b", "reasoning": "y"}
    assert parse_record(record, "prompt", "f", 1, unused=unused).response == "<think>x</think>b"
    assert unused == {"reasoning": 1}
    record = {"prompt": "a", "response": "b", "reasoning": {"effort": "low"}}
    assert parse_record(record, "prompt", "f", 1, unused=unused).response == "b"
    assert unused == {"reasoning": 2}


@pytest.mark.parametrize("key", ["train", "loss"])
def test_a_turn_says_under_other_names_that_it_is_not_learnt(key: str) -> None:
    turns = [
        {"role": role, "content": role, **switch}
        for switch in ({key: False}, {key: True})
        for role in ("user", "assistant")
    ]
    unused: Counter[str] = Counter()
    example = parse_record({"messages": turns}, "messages", "f", 1, unused=unused)
    assert [message.learnt for message in example.messages if message.role == "assistant"] == [False, True]
    assert unused == {f"messages.{key}": 1}  # the users' own, which no one reads
