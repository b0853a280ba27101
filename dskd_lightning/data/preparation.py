"""Read, render and truncate a set of sources once, into a cache that later runs map."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import shutil
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from dskd_lightning.alignment.token_bytes import token_bytes
from dskd_lightning.cores import usable_cores
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.checked_files import damaged
from dskd_lightning.data.chunks import chunked, render_chunk
from dskd_lightning.data.groups import groups_of
from dskd_lightning.data.partial import PartialDataset
from dskd_lightning.data.prepared import PreparedDataset
from dskd_lightning.data.read_share import ReadShare
from dskd_lightning.data.reading import read_records
from dskd_lightning.data.remote_faults import SourceUnavailable
from dskd_lightning.data.rendering import PreparationSettings
from dskd_lightning.data.sources import Source
from dskd_lightning.data.workers import WorkerEnded, worked_in_order
from dskd_lightning.errors import UserError
from dskd_lightning.files import put_in_place
from dskd_lightning.runs.heartbeat import Progress
from dskd_lightning.runs.lock import only_one

__all__ = [
    "UNFINISHED",
    "PreparationSettings",
    "announce",
    "bytes_of",
    "cache_key",
    "prepare",
    "prepared_folder",
    "remove_abandoned",
    "unwritable",
]

_Found = TypeVar("_Found")

_log = logging.getLogger(__name__)
_VERSION = 11  # of the files' layout and of the rendering
UNFINISHED = ".preparing-"
"""How the folders of what isn't finished begin."""
_ABANDONED_AFTER = 24 * 3600  # seconds without a write
_TOGETHER = 16  # questions to servers
_NAMED = 10  # sources in a message


def cache_key(
    sources: Sequence[Source], renderers: Sequence[ChatRenderer], settings: PreparationSettings
) -> str:
    """Hash of the sources' content, the tokenizers, the templates and the settings."""
    content = [[source.name, source.fingerprint()] for source in sources]
    models = [r.fingerprint if r.system is None else [r.fingerprint, r.system] for r in renderers]
    parts = json.dumps([_VERSION, content, models, asdict(settings)], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def prepare(
    sources: Sequence[Source],
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    cache_dir: Path,
    num_proc: int | None = None,
) -> PreparedDataset:
    """The prepared dataset, from the cache where it is there, else made now.

    Where several processes call this at once, perhaps on machines that share the folder, each makes another
    group of the sources (`groups_of`), and waits for what others are at when nothing else is left. A process
    that was killed leaves what it had finished to the next one.

    Args:
        sources: to read.
        renderers: of the student and each teacher.
        settings: of everything else that decides the result.
        cache_dir: holds a folder for each dataset.
        num_proc: processes that render; the result is the same for any number. None for as many as there
            are cores.

    Raises:
        UserError: a bad source or record, no example left, or a full or read-only disk.
    """
    _look_at(sources)
    groups = groups_of(sources, settings.limit)

    @functools.cache
    def key(at: int) -> str:
        return cache_key(groups[at], renderers, settings)

    def attempt(at: int, wait: bool) -> tuple[Path, bool] | None:
        return _prepared_folder(
            groups[at], key(at), renderers, settings, cache_dir, num_proc or usable_cores(), wait=wait
        )

    folders: dict[int, Path] = {}
    made, size, told = False, 0, False
    for at, (folder, is_new) in _in_turn(len(groups), attempt):
        folders[at] = folder
        made |= is_new
        size += bytes_of(folder)
        told = told or _room_is_short(size / len(folders) * (len(groups) - len(folders)), cache_dir)
    dataset = PreparedDataset(*(folders[at] for at in range(len(groups))))
    if not len(dataset):
        raise UserError(
            f"No example is left of {_names(sources)} ({_listed(dataset.report)}): check the files and the "
            "lengths."
        )
    if made:
        announce(dataset, sources)
    return dataset


def _in_turn(count: int, attempt: Callable[[int, bool], _Found | None]) -> Iterator[tuple[int, _Found]]:
    """What ``attempt`` finds for each number; those that others are at come again, waited for in the end.

    Args:
        count: of the numbers from 0 on.
        attempt: given a number and whether to wait for others; None where they are at it.
    """
    left, wait = list(range(count)), False
    while left:
        busy = []
        for at in left:
            if (found := attempt(at, wait)) is None:
                busy.append(at)
            else:
                wait = False
                yield at, found
        wait = len(busy) == len(left)
        left = busy


def _look_at(sources: Sequence[Source]) -> None:
    """Ask for the version of each file that is elsewhere: a missing one is told before hours of work."""
    elsewhere = [source for source in sources if source.is_elsewhere]
    if elsewhere:
        with ThreadPoolExecutor(min(_TOGETHER, len(elsewhere))) as pool:
            for found in [pool.submit(source.fingerprint) for source in elsewhere]:
                found.result()


def _room_is_short(needed: float, cache_dir: Path) -> bool:
    """Say where what is still to be prepared will hardly find room on the disk."""
    free = shutil.disk_usage(cache_dir).free
    if needed > free:
        _log.warning(
            "The data that are still to be prepared will need about %.1f GiB in '%s', where %.1f GiB are "
            "free: free space there, or set `cache_dir`; what is finished is kept.",
            needed / 2**30, cache_dir, free / 2**30,
        )  # fmt: skip
    return needed > free


def prepared_folder(
    sources: Sequence[Source],
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    cache_dir: Path,
    processes: int,
    at_most: int | None = None,
) -> tuple[Path, bool]:
    """The folder of what is prepared together, perhaps without an example, and whether it was made now.

    Args and errors as of `prepare`; more bytes than ``at_most`` are an error too.
    """
    key = cache_key(sources, renderers, settings)
    found = _prepared_folder(sources, key, renderers, settings, cache_dir, processes, at_most)
    assert found is not None  # it was waited for
    return found


def _prepared_folder(
    sources: Sequence[Source],
    key: str,
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    cache_dir: Path,
    processes: int,
    at_most: int | None = None,
    wait: bool = True,
) -> tuple[Path, bool] | None:
    """As `prepared_folder`; None where another process prepares it and isn't waited for."""
    folder = cache_dir / key
    names = _names(sources)
    if _is_there(folder):
        _check_size(bytes_of(folder), at_most, names)
        return folder, False
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with only_one(cache_dir / f".{key}.lock", f"prepares {names}", wait) as alone:
            if alone is None:
                return None
            if _is_there(folder):
                return folder, False
            making = cache_dir / f"{UNFINISHED}{key}"
            remove_abandoned(cache_dir, UNFINISHED, but=making)
            if not alone:
                making = making.with_name(f"{making.name}-{uuid.uuid4().hex[:8]}")
            try:
                _write(making, names, sources, renderers, settings, processes, at_most)
            except UserError as error:
                if not isinstance(error, WorkerEnded | SourceUnavailable):  # going on would raise it again
                    shutil.rmtree(making, ignore_errors=True)
                raise
            if not put_in_place(making, folder):
                shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise unwritable(cache_dir, error) from error
    return folder, True


def _check_size(size: int, at_most: int | None, names: str) -> None:
    if at_most is not None and size > at_most:
        raise UserError(
            f"data.disk_limit_gb: prepared, '{names}' takes more than the {at_most / 2**30:.3g} GiB that one "
            "file may take of it: raise the limit, or split the file."
        )


def bytes_of(folder: Path) -> int:
    """Of a folder of prepared data."""
    return sum(path.stat().st_size for path in folder.iterdir())


def unwritable(cache_dir: Path, error: OSError) -> UserError:
    """The error of a cache on a full, read-only or missing disk."""
    return UserError(
        f"Can't write the data cache in '{cache_dir}' ({error.strerror or error}): free space there or "
        "set `cache_dir`; what is finished is kept."
    )


def remove_abandoned(cache_dir: Path, prefix: str, but: Path) -> None:
    """What killed processes have left of other data; others may be at work on younger ones.

    Args:
        cache_dir: holds the folders.
        prefix: how their names begin.
        but: one that is gone on with.
    """
    for folder in set(cache_dir.glob(f"{prefix}*")) - {but}:
        with contextlib.suppress(OSError):  # another process was faster
            written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - written > _ABANDONED_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _is_there(folder: Path) -> bool:
    if not folder.exists():
        return False
    if not (folder / "report.json").is_file():  # what is there was moved there whole
        raise damaged(folder / "report.json", "it is missing")
    return True


def _write(
    folder: Path,
    names: str,
    sources: Sequence[Source],
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    processes: int,
    at_most: int | None,
) -> None:
    counts: Counter[str] = Counter()
    work = functools.partial(render_chunk, renderers=renderers, settings=settings)
    with (
        PartialDataset(folder, len(renderers)) as made,
        Progress(f"Preparing {names}", None, "records") as progress,
    ):
        with _unchanged(sources):
            share = ReadShare([source.size() for source in sources])
            chunks = chunked(read_records(sources, settings, counts, share))
            done = sum(map(len, itertools.islice(chunks, made.chunks)))  # read again, for what that counts
            if done != made.records:
                raise UserError(
                    f"What is prepared in '{folder}' was begun by another version of this library: it is "
                    "removed now; start again."
                )
            progress.done, progress.share = done, _share(share(), done, settings.limit)
            for renderer in renderers:  # kept, and so made once for all processes that are forked
                token_bytes(renderer.tokenizer)
            progress.go_on()
            read: deque[float | None] = deque()  # shares when each chunk that is in work was read
            noted = _noting(chunks, lambda: read.append(share()))
            for chunk in worked_in_order(work, noted, processes):
                made.append(chunk)
                _check_size(made.size, at_most, names)
                progress.done += chunk.records
                progress.share = _share(read.popleft(), progress.done, settings.limit)
        counts.update(made.counts)
        counts["used"] = made.rows
        made.finish(_ordered(counts))


def _noting(items: Iterator[_Found], note: Callable[[], object]) -> Iterator[_Found]:
    """``items``, with a ``note`` behind the making of each."""
    for item in items:
        note()
        yield item


def _share(read: float | None, records: int, limit: int | None) -> float | None:
    """Of the work: it ends with the last source, or where ``limit`` records are reached."""
    if limit is None:
        return read
    return max(read or 0.0, min(1.0, records / limit)) if limit else None


@contextlib.contextmanager
def _unchanged(sources: Sequence[Source]) -> Iterator[None]:
    """Raise where one of ``sources`` is another at the end, which may be why it can't be read."""
    try:
        yield
    except SourceUnavailable:
        raise
    except UserError:
        for source in sources:
            source.check_unchanged()
        raise
    for source in sources:
        source.check_unchanged()


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    """In an order that doesn't depend on how far ahead of the rendering the files were read."""
    first = [name for name in ("read", "used") if name in counts]
    return {name: counts[name] for name in (*first, *sorted(counts.keys() - {"read", "used"}))}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in counts.items())


def announce(dataset: PreparedDataset, sources: Sequence[Source]) -> None:
    """Say what was read of the sources and what of it was lost."""
    report = dataset.report
    report = {name: number for name, number in report.items() if number}
    lost = any(number for name, number in report.items() if name not in ("read", "used"))
    _log.log(logging.WARNING if lost else logging.INFO, "%s: %s.", _names(sources), _listed(report))


def _names(sources: Sequence[Source]) -> str:
    more = f" and {len(sources) - _NAMED} more" if len(sources) > _NAMED else ""
    return ", ".join(source.name for source in sources[:_NAMED]) + more
