"""Datasets of the Hub read as streams, which a folder on this machine stands in for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dskd_lightning import InstructionDataModule, StudentSpec, UserError
from dskd_lightning.data import chunks
from dskd_lightning.data.hub_stream import HubShard
from dskd_lightning.data.remote_faults import SourceUnavailable
from dskd_lightning.data.sources import resolve_sources

ROWS = [{"prompt": f"Say {n}, é.", "response": f"{n} " * (n % 5) + "."} for n in range(100)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``owner/name``: three files of its training split, one of its test split."""
    folder = tmp_path / "hub" / "owner" / "name"
    folder.mkdir(parents=True)
    for number in range(3):
        lines = [json.dumps(row) + "\n" for row in ROWS[40 * number : 40 * number + 40]]
        (folder / f"train-{number}.jsonl").write_text("".join(lines))
    (folder / "test-0.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    builder, load = datasets.load_dataset_builder, datasets.load_dataset
    here = tmp_path / "hub"
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name, config: builder(str(here / name), config)
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, split: load(str(here / name), config, split=split)
    )
    monkeypatch.setattr(chunks, "_RECORDS", 3)
    return folder


@pytest.fixture
def build(model_folder, tmp_path: Path) -> Callable[..., InstructionDataModule]:
    def make(cache: str, **options: Any) -> InstructionDataModule:
        options = {"train": "owner/name", "streaming": True, "num_proc": 1, **options}
        return InstructionDataModule(
            student=StudentSpec(model_folder()),
            cache_dir=str(tmp_path / cache),
            max_length=64,
            max_prompt_length=32,
            **options,
        )

    return make


def prepared(data: InstructionDataModule) -> tuple[list[list[int]], list[str]]:
    dataset = data._prepared("train")
    rows = range(len(dataset))
    return (
        [dataset.rendered(row).input_ids.tolist() for row in rows],
        [dataset.example(row).response or "" for row in rows],
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_streamed_rows_are_those_of_the_dataset(hub: Path, kind: str) -> None:
    if kind == "parquet":
        for path in hub.iterdir():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"), row_group_size=9)
            path.unlink()
    sources = resolve_sources("owner/name", streaming=True)
    assert [source.name for source in sources] == [f"owner/name (part {n} of 3)" for n in (1, 2, 3)]
    assert [record.value for source in sources for record in source.records()] == ROWS
    assert [record.line for record in sources[2].records()] == list(range(1, 21))
    (test,) = resolve_sources("owner/name:test", streaming=True)
    assert (test.name, [record.value for record in test.records()]) == ("owner/name:test", ROWS[:1])
    (test,) = resolve_sources("owner/name", "test", streaming=True)
    assert len(list(test.records())) == 1


def test_prepared_tokens_are_those_of_the_whole_dataset_and_nothing_else_is_on_the_disk(
    hub: Path, build, tmp_path: Path
) -> None:
    streamed = prepared(build("streamed"))
    assert streamed[1] == [row["response"] for row in ROWS]
    files = (path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock")
    written = [path for path in files if hub not in path.parents]
    assert {path.parent.parent.name for path in written} == {"streamed"}
    assert not [path for path in written if b'{"prompt"' in path.read_bytes()]
    assert prepared(build("whole", streaming=False)) == streamed
    assert list((tmp_path / "hf").rglob("*.arrow"))  # what isn't streamed lies there


def test_a_stream_that_breaks_off_keeps_what_is_finished(
    hub: Path, build, tmp_path: Path, monkeypatch
) -> None:
    whole, rows, read = prepared(build("whole")), HubShard.rows, []

    class Lost:
        """A dataset whose second file breaks off."""

        def __init__(self, dataset: Any) -> None:
            self.dataset = dataset

        def shard(self, parts: int, index: int) -> Any:
            for number, row in enumerate(self.dataset.shard(parts, index)):
                if index == 1 and number == 30:
                    raise ConnectionError("Server Disconnected from https://host/x?sig=secret")
                yield row

    def told(shard: HubShard) -> Any:
        read.append(shard.number)
        return rows(shard)

    monkeypatch.setattr(HubShard, "rows", told)
    with monkeypatch.context() as patch:
        patch.setattr(
            HubShard,
            "rows",
            lambda s: rows(HubShard(s.name, s.number, s.parts, s.version, Lost(s.dataset))),
        )
        with pytest.raises(SourceUnavailable) as caught:
            build("cache")._prepared("train")
    assert str(caught.value) == (
        "Can't read the dataset 'owner/name (part 2 of 3)' (Server Disconnected from https://host/x?***): "
        "look at the network, and start again, which goes on with what is finished."
    )
    finished = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert len(finished) == 1
    assert prepared(build("cache")) == whole
    assert read == [2, 3]


def test_another_version_of_the_dataset_is_prepared_anew(hub: Path) -> None:
    def fingerprints() -> list[str]:
        return [source.fingerprint() for source in resolve_sources("owner/name", streaming=True)]

    before = fingerprints()
    assert len(set(before)) == 3
    assert fingerprints() == before
    (hub / "train-1.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert not set(fingerprints()) & set(before)


def test_weights_are_of_the_whole_dataset(hub: Path, build, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    data = build("cache", train=["owner/name", str(tmp_path / "more.jsonl")], weights={"owner/name": 2})
    data.setup("fit")
    assert np.bincount(data.first_epoch()).tolist() == [2] * 100 + [1]


@pytest.mark.parametrize(
    "entry", ["owner/name:train[:10%]", "owner/name:nothing", "owner/none", "owner/name@other"]
)
def test_what_cannot_be_streamed_is_one_sentence(hub: Path, entry: str) -> None:
    with pytest.raises(UserError, match=r"Can't stream the dataset '.*give a Hub dataset as") as caught:
        resolve_sources(entry, streaming=True)
    assert entry in str(caught.value)
    assert "\n" not in str(caught.value)
