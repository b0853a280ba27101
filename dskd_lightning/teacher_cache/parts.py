"""A cache that several jobs compute, each a part of its shards, and that is joined afterwards."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from dskd_lightning.errors import UserError
from dskd_lightning.files import replacing, write_object
from dskd_lightning.runs.parts import Part, missing_parts, number_ranges
from dskd_lightning.teacher_cache.manifest import Layout, Manifest, differing_parts
from dskd_lightning.teacher_cache.shards import check_shard, shard_name
from dskd_lightning.teacher_cache.store import read_layout

__all__ = ["join_parts", "say_done"]

_log = logging.getLogger(__name__)
_OF_WEIGHTS = ("weights", "head", "hidden_size", "teacher_dtype", "shard_tokens", "index_crc32")


def say_done(folder: Path, part: Part) -> None:
    """Leave a note in a cache's folder that the part is complete."""
    write_object(folder / f"{part.name}.json", {"part": part.number, "of": part.of})


def join_parts(folder: Path, places: Sequence[Path], parts: dict[str, str], source: str) -> None:
    """Copy what a cache lacks from other folders of caches; what is copied stays, whatever is missing.

    Args:
        folder: of the cache to complete.
        places: folders of caches, or folders that hold some as ``teacher-states``.
        parts: of the cache's manifest.
        source: what the teacher is called.

    Raises:
        UserError: a place has no part of the cache, one was computed with other weights, a shard is
            damaged, or some are nowhere.
    """
    found = [_place(place, folder.name, parts, source) for place in places]
    manifest = _manifest(folder, found, source)
    layout = read_layout(folder, manifest)
    missing, copied = [], 0
    for shard in layout.missing(folder):
        holders = [place for place in found if (place / shard_name(shard)).is_file()]
        if not holders:
            missing.append(shard)
            continue
        check_shard(holders[0] / shard_name(shard), manifest.key, content=True)
        _copy(holders[0] / shard_name(shard), folder / shard_name(shard))
        copied += 1
    twice = [
        shard for shard in range(layout.shards) if sum((p / shard_name(shard)).is_file() for p in found) > 1
    ]
    told = (
        f"; shards {number_ranges(twice)} are in several folders, of which the first is taken"
        if twice
        else ""
    )
    _log.info("Teacher cache of '%s': %s shards copied to '%s'%s.", source, copied, folder, told)
    if missing:
        raise UserError(
            f"--join: {_lacking(found, layout, missing)} of the cache of '{source}' in none of the folders: "
            "compute what is missing with `dskd cache`, and join again."
        )


def _lacking(found: Sequence[Path], layout: Layout, missing: Sequence[int]) -> str:
    """The parts that nobody has completed, or the shards."""
    notes = (Part.from_name(path.stem) for place in found for path in place.glob("part-*-of-*.json"))
    absent = missing_parts(part for part in notes if part is not None)
    return absent or f"shards {number_ranges(missing)} of {layout.shards}"


def _place(place: Path, key: str, parts: dict[str, str], source: str) -> Path:
    roots = (place, place / "teacher-states")
    for candidate in (place, *(root / key for root in roots)):
        if candidate.name == key and Manifest.read(candidate) is not None:
            return candidate
    nearest = Manifest.nearest(roots, parts)
    why = "no cache lies there"
    if nearest is not None:
        why = f"the nearest one differs in: {', '.join(differing_parts(parts, nearest.parts))}"
    raise UserError(f"--join: '{place}' holds no part of the cache of '{source}' ({why}).")


def _manifest(folder: Path, places: Sequence[Path], source: str) -> Manifest:
    """The one that all agree on, written to ``folder`` with its index."""
    own = Manifest.read(folder)
    first = own or Manifest.read(places[0])
    assert first is not None
    for place in places:
        other = Manifest.read(place)
        if other is None or any(getattr(other, name) != getattr(first, name) for name in _OF_WEIGHTS):
            raise UserError(
                f"--join: '{place}' was computed with other weights of '{source}' than "
                f"'{folder if own else places[0]}': compute one of them anew."
            )
    if own is None:
        folder.mkdir(parents=True, exist_ok=True)
        _copy(places[0] / "tokens.npy", folder / "tokens.npy")
        first.write(folder)
    return first


def _copy(source: Path, target: Path) -> None:
    try:
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
    except OSError as error:
        raise UserError(f"Can't copy '{source}' to '{target}' ({error.strerror or error}).") from error
