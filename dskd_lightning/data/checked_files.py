"""Prepared files with checksums: whatever is read of them is compared before it is used."""

from __future__ import annotations

import bisect
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, write_object

__all__ = ["ArrowRows", "Blocks", "ChainedRows", "damaged", "read_array", "read_report", "write_report"]


@dataclass(frozen=True)
class Blocks:
    """The messages of an Arrow stream: first its schema, then its record batches.

    Args:
        size: of the file.
        starts: where each message begins, and where the last one ends.
        rows: of each record batch.
        crc32: of each message.
    """

    size: int
    starts: tuple[int, ...]
    rows: tuple[int, ...]
    crc32: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.starts) - 1 == len(self.crc32) == len(self.rows) + 1:
            raise ValueError("blocks and checksums don't agree in number")


def damaged(path: Path, reason: object) -> UserError:
    """The error of a file in a folder of prepared data."""
    return UserError(
        f"The prepared data in '{path.parent}' are damaged ({path.name}: {reason}): delete that folder, "
        "which prepares them anew."
    )


def write_report(
    path: Path, counts: dict[str, int], arrays: Sequence[Path], streams: dict[str, Blocks]
) -> None:
    """What was counted, and the checksums of everything beside this file and of itself."""
    content = {
        "counts": counts,
        "arrays": {array.name: zlib.crc32(array.read_bytes()) for array in arrays},
        "streams": {name: asdict(blocks) for name, blocks in streams.items()},
    }
    write_object(path, content, indent=None)


def read_report(path: Path) -> tuple[dict[str, int], dict[str, int], dict[str, Blocks]]:
    """Counts, checksums of arrays, and blocks of streams by file.

    Raises:
        UserError: the report is damaged.
    """
    content = read_object(path, f"delete the folder '{path.parent}' to prepare the data anew")
    streams = {
        name: Blocks(blocks["size"], *(tuple(blocks[key]) for key in ("starts", "rows", "crc32")))
        for name, blocks in content["streams"].items()
    }
    return content["counts"], content["arrays"], streams


def read_array(path: Path, crc32: int) -> npt.NDArray[Any]:
    """An array of numpy's, read whole.

    Raises:
        UserError: it is missing or isn't what was written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror) from error
    if zlib.crc32(content) != crc32:
        raise damaged(path, "its checksum differs")
    return np.load(io.BytesIO(content))


class ArrowRows:
    """Random access to the rows of a memory-mapped Arrow stream.

    A block is compared with its checksum where this process first reads of it, so that nothing
    damaged is used and nothing is read for the sake of checking alone.

    Args:
        path: the file.
        blocks: what was written to it.

    Raises:
        UserError: the file is missing or has another size.
    """

    def __init__(self, path: Path, blocks: Blocks) -> None:
        self._path, self._blocks = path, blocks
        self._rows = [0, *itertools.accumulate(blocks.rows)]
        self._chunks: dict[int, Any] = {}
        self._content: Any = None
        self._schema: Any = None
        try:
            size = path.stat().st_size
        except OSError as error:
            raise damaged(path, error.strerror) from error
        if size != blocks.size:
            raise damaged(path, f"it has {size} bytes instead of {blocks.size}")

    def __getstate__(self) -> dict[str, Any]:
        # Each worker maps the file itself.
        return {**self.__dict__, "_chunks": {}, "_content": None, "_schema": None}

    def __len__(self) -> int:
        return self._rows[-1]

    def row(self, index: int) -> tuple[Any, int]:
        """The record batch that holds row ``index``, and where in it.

        Raises:
            UserError: that part of the file is damaged.
        """
        at = bisect.bisect_right(self._rows, index) - 1
        if at not in self._chunks:
            self._chunks[at] = self._read(at)
        return self._chunks[at], index - self._rows[at]

    def chunks(self) -> Iterator[Any]:
        """All record batches in order.

        Raises:
            UserError: a part of the file is damaged.
        """
        for start in self._rows[:-1]:
            yield self.row(start)[0]

    def _read(self, batch: int) -> Any:
        import pyarrow as pa

        try:
            if self._content is None:
                self._content = pa.memory_map(str(self._path)).read_buffer()
                self._schema = pa.ipc.read_schema(self._checked(0))
            return pa.ipc.read_record_batch(self._checked(batch + 1), self._schema)
        except (OSError, pa.ArrowException) as error:
            raise damaged(self._path, error) from error

    def _checked(self, block: int) -> Any:
        start, stop = self._blocks.starts[block : block + 2]
        content = self._content.slice(start, stop - start)  # no copy
        if zlib.crc32(content) != self._blocks.crc32[block]:
            raise damaged(self._path, "its checksum differs")
        return content


class ChainedRows:
    """The rows of several files, one behind another.

    Args:
        parts: in their order.
    """

    def __init__(self, parts: Sequence[ArrowRows]) -> None:
        self._parts = list(parts)
        self._rows = [0, *itertools.accumulate(map(len, parts))]

    def row(self, index: int) -> tuple[Any, int]:
        """As `ArrowRows.row`."""
        at = bisect.bisect_right(self._rows, index) - 1
        return self._parts[at].row(index - self._rows[at])

    def chunks(self) -> Iterator[Any]:
        """As `ArrowRows.chunks`."""
        return itertools.chain.from_iterable(part.chunks() for part in self._parts)
