"""How much of the sources is read: told by bytes or rows, so that preparation can tell the time left."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from random import Random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dskd_lightning import InstructionDataModule, StudentSpec
from dskd_lightning.data import chunks
from dskd_lightning.data.partial import PartialDataset
from dskd_lightning.data.read_share import ReadShare
from dskd_lightning.data.reading import read_records
from dskd_lightning.data.rendering import PreparationSettings
from dskd_lightning.data.sources import Source, resolve_sources
from dskd_lightning.runs.heartbeat import Progress

ROWS = [{"prompt": f"Say {n}.", "response": Random(n).randbytes(500).hex()} for n in range(4000)]


def written(path: Path) -> Path:
    lines = [json.dumps(row) for row in ROWS]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        texts = [f"{row['prompt']},{row['response']}" for row in ROWS]
        path.write_text("prompt,response\n" + "\n".join(texts))
    elif path.name == "array.json":
        path.write_text("[" + ",\n".join(lines) + "]")
    elif path.name == "object.json":
        path.write_text('{"data": [' + ",\n".join(lines) + "]}")
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write("\n".join(lines).encode())
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(lines))
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


def shares(sources: list[Source], **settings) -> list[float | None]:
    """What is known behind each record."""
    share = ReadShare([source.size() for source in sources])
    assert share() is None
    return [share() for _ in read_records(sources, PreparationSettings(**settings), Counter(), share)]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.csv", "a.parquet", "array.json", "object.json", "a.jsonl.gz", "a.jsonl.zst", "saved"],
)
def test_of_each_kind_of_file(tmp_path, name) -> None:
    found = shares(resolve_sources(str(written(tmp_path / name))))
    assert found == sorted(found)
    assert found[1999] == pytest.approx(0.5, abs=0.2)
    assert found[-1] == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_of_files_elsewhere(tmp_path, name) -> None:
    found = shares(resolve_sources(f"file://{written(tmp_path / name)}"))
    assert found == sorted(found)
    assert found[1999] == pytest.approx(0.5, abs=0.2)
    assert found[-1] == 1


def test_of_records_in_memory() -> None:
    assert shares(resolve_sources(ROWS[:4])) == [0.25, 0.5, 0.75, 1]


def test_of_several_files_by_their_bytes_where_all_are_known(tmp_path) -> None:
    small, empty, large = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    line = json.dumps({"prompt": "a", "response": "b"}) + "\n"
    small.write_text(line)
    empty.write_text("")
    large.write_text(line * 3)
    assert shares(resolve_sources(str(tmp_path))) == [0.25, 1, 1, 1]  # of small ones all is read at once
    sources = [*resolve_sources(str(small)), *resolve_sources([{"prompt": "a", "response": "b"}])]
    assert shares(sources) == [None, None]


def test_preparation_tells_the_share_of_what_is_finished_also_after_a_kill(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "_RECORDS", 100)
    monkeypatch.setattr("dskd_lightning.data.partial._EVERY", 4)
    append, made, seen = PartialDataset.append, [], []
    begin = Progress.begin
    monkeypatch.setattr(Progress, "begin", lambda self, *what: (made.append(self), begin(self, *what))[1])

    def told(partial, chunk) -> None:
        seen.append((made[-1].done, made[-1].share, made[-1]._before))
        append(partial, chunk)
        if partial.chunks == stop:
            raise KeyboardInterrupt

    def data(name: str, **options) -> InstructionDataModule:
        return InstructionDataModule(
            str(tmp_path / name), student=StudentSpec("demo"), cache_dir=str(tmp_path / "cache"),
            max_length=64, max_prompt_length=32, learn="everything", num_proc=2, **options,
        )  # fmt: skip

    monkeypatch.setattr(PartialDataset, "append", told)
    written(tmp_path / "a.jsonl")
    stop = 20
    with pytest.raises(KeyboardInterrupt):
        data("a.jsonl")._prepared("train")
    assert seen[0] == (0, None, (0, 0.0))
    assert seen[10][:2] == (1000, pytest.approx(0.25, abs=0.05))
    stop = 0
    seen.clear()
    data("a.jsonl")._prepared("train")
    assert seen[0] == (2000, pytest.approx(0.5, abs=0.05), (2000, pytest.approx(0.5, abs=0.05)))
    assert (made[-1].done, made[-1].share) == (4000, 1)
    data("a.jsonl", limit=250)._prepared("train")
    assert (made[-1].done, made[-1].share) == (250, 1)
