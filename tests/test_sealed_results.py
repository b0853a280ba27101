"""JSON files with a checksum."""

from __future__ import annotations

import json

import pytest

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, sealed, unsealed, write_object

VALUES = {"rougeL": 32.5, "none": None, "model": {"step": 12, "checkpoint": "best.ckpt"}, "texts": ["é", "b"]}


def test_objects_are_read_as_they_were_written(tmp_path) -> None:
    written = {**VALUES, 3: (1, 2), "cut": "\ud83d", "infinite": float("inf")}
    write_object(tmp_path / "a.json", written)
    read = read_object(tmp_path / "a.json", "write it again")
    assert read == {**VALUES, "3": [1, 2], "cut": "?", "infinite": float("inf")}
    write_object(tmp_path / "b.json", read)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_no_flipped_bit_passes_for_what_was_written(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_object(path, VALUES)
    good, refused = path.read_bytes(), 0
    for at in range(len(good)):
        for bit in range(8):
            content = bytearray(good)
            content[at] ^= 1 << bit
            path.write_bytes(content)
            try:
                read = read_object(path, "write it again")
            except UserError as error:
                refused += "isn't as it was written" in str(error)
            else:
                assert {**read, **VALUES} == read
    assert refused > 100


def test_without_a_checksum_objects_are_taken_as_they_are(tmp_path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(VALUES))
    assert read_object(tmp_path / "a.json", "write it again") == VALUES


def test_a_change_on_purpose_is_told_what_to_do() -> None:
    changed = {**sealed(VALUES), "rougeL": 99.0}
    with pytest.raises(UserError, match=r"a\.json: isn't .* take its 'crc32' out, otherwise write"):
        unsealed(changed, "a.json", "write it again")
    del changed["crc32"]
    assert unsealed(changed, "a.json", "write it again")["rougeL"] == 99.0
