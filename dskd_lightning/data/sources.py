"""Records out of files, folders, URLs and Hub datasets, streamed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dskd_lightning.data.compressed import PACKED, kind_of
from dskd_lightning.data.file_names import is_beside_data
from dskd_lightning.data.hub_stream import HubShard, hub_shards
from dskd_lightning.data.json_stream import Skip, iter_json
from dskd_lightning.data.read_share import ReadShare, told
from dskd_lightning.data.remote import DataFile, RemoteFile, remote_files, size_of
from dskd_lightning.data.tables import ROWS, iter_csv, iter_parquet, rows_of
from dskd_lightning.data.urls import expanded, is_url
from dskd_lightning.demo import DATASET
from dskd_lightning.errors import UserError
from dskd_lightning.runs.text import visible

if TYPE_CHECKING:
    from typing import TypeAlias

    from datasets import Dataset

    Sources: TypeAlias = str | list[str] | Sequence[Mapping[str, Any]] | Dataset
else:  # what a command line can say
    Sources = str | list[str]

__all__ = ["Record", "Source", "Sources", "resolve_sources"]

_TEXTS = (".json", ".jsonl", ".ndjson", ".csv")
_SUFFIXES = (*_TEXTS, ".parquet", *(text + packed for packed in PACKED for text in _TEXTS))
_KINDS = f"{', '.join((*_TEXTS, '.parquet'))} (or {' or '.join(PACKED)} of one)"
_HUB_ID = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]:%+-]+))?"
)


@dataclass(frozen=True)
class Record:
    """One raw record and the place it came from."""

    value: Any
    source: str
    line: int


@dataclass(frozen=True)
class Source:
    """One file, or one split of a dataset.

    Args:
        name: the file's path, or the dataset's name.
        path: the file, here or behind a URL, or saved dataset; None for the Hub.
        config: configuration of a Hub dataset.
        split: split of a Hub or saved dataset.
        memory: the records themselves, a list of them or a ``datasets.Dataset``; None reads them.
        shard: of a Hub dataset that is read as a stream.
    """

    name: str
    path: DataFile | None = None
    config: str | None = None
    split: str = "train"
    memory: Any = field(default=None, repr=False, compare=False)
    shard: HubShard | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is read over a network that may fail."""
        return self.shard is not None or isinstance(self.path, RemoteFile)

    @property
    def is_file(self) -> bool:
        """Whether it is one file, whose records consist of JSON's or Arrow's own types."""
        if isinstance(self.path, RemoteFile):
            return True
        return self.path is not None and not self.path.is_dir()

    def size(self) -> int | None:
        """Bytes of a file; None of anything else, or where nobody says it."""
        return size_of(self.path) if self.is_file and self.path is not None else None

    def records(self, skip: Skip | None = None, share: ReadShare | None = None) -> Iterator[Record]:
        """All records in order; never more than a chunk of them in memory.

        Args:
            skip: called with the error of a malformed line, which is then left out; None raises it.
            share: told how much of the source is read, where that is known.

        Raises:
            UserError: the source can't be read or is malformed (with its line).
        """
        try:
            for line, value in self._values(skip, share):
                yield Record(value, self.name, line)
        except OSError as error:
            raise UserError(f"Can't read '{self.name}': {error.strerror or error}.") from error

    def fingerprint(self) -> str:
        """Hash of the content, or of what tells it from others where it is elsewhere.

        Raises:
            UserError: the source can't be read.
        """
        if self.shard is not None:
            return self.shard.fingerprint()
        if isinstance(self.path, RemoteFile):
            return self.path.fingerprint()
        if isinstance(self.memory, Sequence):
            digest = hashlib.sha256()
            for value in self.memory:
                digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
            return digest.hexdigest()
        if self.path is not None and self.path.is_file():
            try:
                with self.path.open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"Can't read '{self.name}': {error.strerror or error}.") from error
        return str(self._dataset()._fingerprint)

    def check_unchanged(self) -> None:
        """Compare what is behind a URL with what its fingerprint was taken of.

        Raises:
            SourceChanged: it is something else now.
            SourceUnavailable: it can't be looked at.
        """
        if isinstance(self.path, RemoteFile):
            self.path.check_unchanged()

    def _values(self, skip: Skip | None, share: ReadShare | None) -> Iterator[tuple[int, Any]]:
        if isinstance(self.memory, Sequence):
            yield from told(enumerate(self.memory, 1), len(self.memory), share)
        elif self.shard is not None:
            yield from self.shard.rows()
        elif self.path is None or (isinstance(self.path, Path) and self.path.is_dir()):
            dataset = self._dataset()
            pieces = (rows_of(dataset[start : start + ROWS]) for start in range(0, len(dataset), ROWS))
            yield from told(enumerate(chain.from_iterable(pieces), 1), len(dataset), share)
        elif self.path.suffix == ".parquet":
            yield from iter_parquet(self.path, share)
        elif kind_of(self.path) == ".csv":
            yield from iter_csv(self.path, skip, share)
        else:
            yield from iter_json(self.path, skip, share)

    def _dataset(self) -> Any:
        import datasets

        if self.memory is not None:
            return self.memory
        try:
            if self.path is None:
                return datasets.load_dataset(
                    self.name.split("@")[0].split(":")[0], self.config, split=self.split
                )
            saved = datasets.load_from_disk(str(self.path))
            return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
        except Exception as error:  # the libraries below raise many unrelated types
            raise UserError(
                f"Can't load the dataset '{self.name}' (split '{self.split}'): {error}. Give an existing "
                "file or folder, or a Hub dataset as `owner/name[@config][:split]`."
            ) from error


def resolve_sources(sources: Sources, split: str = "train", streaming: bool = False) -> list[Source]:
    """Find out what each entry means, without reading it.

    Args:
        sources: ``demo`` (the shipped instruction set), files, folders (all data files below, sorted,
            but hidden ones and what ``dskd generate`` says of its files), likewise URLs of files, folders
            or patterns (``s3://bucket/train-*.jsonl``), datasets written by ``save_to_disk``, Hub datasets
            (``owner/name[@config][:split]``), or what is in memory: a ``datasets.Dataset`` or a list of
            records.
        split: the split of a dataset that names none.
        streaming: read Hub datasets part by part without keeping their files.

    Raises:
        UserError: a missing path, a folder without data files, an unknown kind of file, a server or bucket
            that can't be listed.
    """
    if isinstance(sources, str):
        return _resolve(sources, split, streaming)
    if not isinstance(sources, Sequence) or not all(isinstance(entry, str) for entry in sources):
        return [_in_memory(sources, split)]
    return [found for entry in sources for found in _resolve(str(entry), split, streaming)]


def _in_memory(records: Any, split: str) -> Source:
    name = f"{split} data in memory"
    if isinstance(records, Sequence):
        odd = next((at for at, record in enumerate(records, 1) if not isinstance(record, Mapping)), None)
        if odd is None:
            return Source(name, memory=records)
        raise UserError(
            f"Record {odd} of the {name} is no mapping but {type(records[odd - 1]).__name__}: give records "
            "such as {'messages': [...]}, or the names of files alone."
        )
    if hasattr(records, "_fingerprint") and hasattr(records, "column_names"):
        return Source(name, memory=records)
    raise UserError(
        f"The {split} data are a {type(records).__name__}: give files, a list of records, or one split of a "
        "datasets.Dataset."
    )


def _resolve(entry: str, split: str, streaming: bool) -> list[Source]:
    if is_url(entry):
        files = remote_files(expanded(entry), lambda name: name.endswith(_SUFFIXES))
        return [Source(visible(str(file)), file) for file in files]
    path = DATASET if entry == "demo" else Path(entry).expanduser()
    if path.is_dir():
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return [Source(entry, path, split=split)]
        found = sorted(
            file
            for file in path.rglob("*")
            if file.name.endswith(_SUFFIXES) and file.is_file() and not _is_beside_data(file, path)
        )
        if not found:
            raise UserError(f"The folder '{entry}' holds no {_KINDS} file: name another folder.")
        return [Source(visible(str(file)), file) for file in found]
    if path.exists():
        if not path.name.endswith(_SUFFIXES):
            raise UserError(f"'{entry}' is no {_KINDS} file: convert or rename it.")
        return [Source(visible(entry), path)]
    match = _HUB_ID.fullmatch(entry)
    if match is None or path.name.endswith(_SUFFIXES) or entry.startswith((".", "/", "~")):
        raise UserError(f"The data file '{entry}' doesn't exist: correct the path.")
    config, split = match["config"], match["split"] or split
    if streaming:
        shards = hub_shards(entry, match["name"], config, split)
        return [Source(str(shard), None, config, split, shard=shard) for shard in shards]
    return [Source(entry, None, config, split)]


def _is_beside_data(file: Path, folder: Path) -> bool:
    below = file.relative_to(folder).parts
    return is_beside_data(below, file.name, lambda other: file.with_name(other).is_file())
