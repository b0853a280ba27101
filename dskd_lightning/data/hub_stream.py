"""Datasets of the Hub as streams, one shard (mostly a file) at a time; nothing of them lies on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dskd_lightning.data.remote_faults import SourceUnavailable, said
from dskd_lightning.errors import UserError

__all__ = ["HubShard", "hub_shards"]


@dataclass(frozen=True)
class HubShard:
    """One of the parts that a dataset is read in.

    Args:
        name: of the dataset, as the user wrote it.
        number: of the part, from 1.
        parts: how many there are.
        version: of the dataset: the commit that all its parts are read at.
        dataset: the whole, a ``datasets.IterableDataset``.
    """

    name: str
    number: int
    parts: int
    version: str
    dataset: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.name if self.parts == 1 else f"{self.name} (part {self.number} of {self.parts})"

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Number from 1 and value of each row.

        Raises:
            SourceUnavailable: it can't be read, or no longer; ``datasets`` has tried that several times.
        """
        try:
            yield from enumerate(self.dataset.shard(self.parts, self.number - 1), 1)
        except Exception as error:  # of many libraries
            raise SourceUnavailable(
                f"Can't read the dataset '{self}' ({said(error)}): look at the network, and start again, "
                "which goes on with what is finished."
            ) from error

    def fingerprint(self) -> str:
        """Hash of the dataset's version and the part."""
        return hashlib.sha256(f"{self.version} {self.number} {self.parts}".encode()).hexdigest()


def hub_shards(entry: str, name: str, config: str | None, split: str) -> list[HubShard]:
    """The parts of a dataset, without reading them.

    Args:
        entry: how the user wrote the following.
        name: of the dataset, ``owner/name``.
        config: one of its configurations.
        split: one of its splits, or several (``train+test``), but no slice of one.

    Raises:
        UserError: there is no such dataset, configuration or split, or the Hub can't be reached.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config)
        dataset = builder.as_streaming_dataset(split)
        parts = dataset.num_shards
    except Exception as error:  # of many libraries
        raise UserError(
            f"Can't stream the dataset '{entry}' (split '{split}'; {said(error)}): give a Hub dataset as "
            "`owner/name[@config][:split]`, its split without a slice."
        ) from error
    version = f"{name} {builder.config_id} {builder.hash} {split}"
    return [HubShard(entry, number, parts, version, dataset) for number in range(1, parts + 1)]
