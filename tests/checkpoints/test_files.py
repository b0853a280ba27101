"""Checkpoint files: whole or absent, and compared with what was written."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dskd_lightning.checkpoints import digest_of, files, read_checkpoint, write_file
from dskd_lightning.errors import UserError

CHECKPOINT = {"state_dict": {"student.w": torch.arange(6.0)}, "global_step": 3}


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_file(CHECKPOINT, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def same(checkpoint: dict[str, Any]) -> bool:
    weight = checkpoint["state_dict"]["student.w"]
    return torch.equal(weight, torch.arange(6.0)) and checkpoint["global_step"] == 3


def test_the_digest_is_that_of_the_content_and_any_reader_reads_it(path) -> None:
    content = path.read_bytes()
    mark = len(b"dskd sha256 ") + 64
    expected = hashlib.sha256(content[: -mark - 2]).hexdigest()
    assert content.endswith(expected.encode())
    assert digest_of(path) == expected[:16]
    assert same(read_checkpoint(path))
    assert same(read_checkpoint(path, mmap=True))
    assert same(torch.load(path, weights_only=True))
    assert same(torch.load(path, weights_only=True, mmap=True))
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_large_tensor_is_written_in_parts_of_any_size(tmp_path) -> None:
    weights = {"w": torch.rand(300_000), "v": torch.rand(1)}
    write_file({"state_dict": weights}, tmp_path / "a.ckpt")
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.ckpt")["state_dict"], weights, rtol=0, atol=0)


def test_no_flipped_byte_is_used(path) -> None:
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        try:
            assert same(read_checkpoint(path)), at  # the flip was in the digest's mark
        except UserError as error:
            refused += 1
            assert "can't be used" in str(error)  # noqa: PT017
    assert refused >= (len(content) - 80) // 7


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.95])
def test_nothing_cut_off_is_used(path, share) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="can't be used"):
        read_checkpoint(path)


def test_a_file_of_another_program_is_read_and_its_archive_is_checked(tmp_path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(CHECKPOINT, path)
    assert same(read_checkpoint(path))
    content = path.read_bytes()
    at = content.index(torch.arange(6.0).numpy().tobytes()) + 5
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(UserError, match="checksum of"):
        read_checkpoint(path)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "JSON": lambda path: path.write_text('{"state_dict": 3}'),
    "another object": lambda path: torch.save([1, 2], path),
    "no weights": lambda path: torch.save({"state_dict": 3}, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(path.parent / "ran"))),
    "archived pickle": lambda path: torch.save({"state_dict": Bomb(path.parent / "ran")}, path),
    "with a digest of its own": lambda path: write_file(
        {"state_dict": {}, "x": Bomb(path.parent / "ran")}, path
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_one_sentence_and_run_nothing(path, kind) -> None:
    other = path.with_name("best.ckpt")
    FOREIGN[kind](other)
    with pytest.raises(UserError, match=r"can't be used \(.*the one beside it, --ckpt_path .*last\.ckpt\.$"):
        read_checkpoint(other)
    assert not (path.parent / "ran").exists()


def test_what_can_be_used_instead_is_looked_at_too(path) -> None:
    for name in ("best", "step"):
        path.with_name(f"{name}.ckpt").write_bytes(b"")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="nor any other checkpoint beside it"):
        read_checkpoint(path)


@pytest.mark.parametrize("at", ["fsync", "replace", "write"])
def test_a_kill_while_writing_leaves_the_old_file_or_the_new(path, at) -> None:
    if not (process := os.fork()):

        def die(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if at == "write":
            original = files._Hashing.write

            def write(self: Any, data: Any) -> int:
                if len(data) > 1000:
                    die()
                return original(self, data)

            files._Hashing.write = write  # type: ignore[method-assign]
        elif at == "fsync":
            os.fsync = die  # type: ignore[assignment]
        else:
            Path.replace = die  # type: ignore[assignment, method-assign]
        write_file({"state_dict": {"w": torch.zeros(10_000)}}, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -9
    assert same(read_checkpoint(path))
    write_file({"state_dict": {}}, path)  # takes what the kill left
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("place", "at"), [(os, "fsync"), (Path, "replace")], ids=["written", "replaced"])
def test_what_cannot_be_written_names_the_checkpoint(path, monkeypatch, place, at) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", "temporary")

    monkeypatch.setattr(place, at, fail)
    with pytest.raises(OSError, match=r"last\.ckpt") as caught:
        write_file(CHECKPOINT, path)
    assert caught.value.errno == errno.EPERM
    monkeypatch.undo()
    assert same(read_checkpoint(path))
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
