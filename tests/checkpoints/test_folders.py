"""Checkpoint folders of sharded runs: whole or absent, checked, and nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dskd_lightning.checkpoints import check_checkpoint, digest_of, read_checkpoint, restored, write_folder
from dskd_lightning.errors import UserError
from dskd_lightning.strategies.checkpoints import WholeCheckpoints

WEIGHTS = {"student.w": torch.arange(6.0).view(2, 3), "student.b": torch.ones(2, dtype=torch.bfloat16)}


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def write(folder: Path, scale: float = 1.0) -> None:
    """As Lightning does."""
    weights = {name: value * scale for name, value in WEIGHTS.items()}
    groups = [{"lr": 0.1, "betas": (0.9, 0.99)}]
    states = {"param_groups": groups, "state": {"0": {"step": torch.tensor(3.0)}}}
    dcp.save({"state_dict": weights, "optimizer_0": states}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 3}, folder / "meta.pt")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_folder(tmp_path / "last.ckpt", write)
    return tmp_path / "last.ckpt"


def same(checkpoint: dict[str, Any]) -> bool:
    state = checkpoint["state_dict"]
    return state.keys() == WEIGHTS.keys() and all(torch.equal(state[name], WEIGHTS[name]) for name in WEIGHTS)


def test_folders_are_read_whole(path) -> None:
    checkpoint = read_checkpoint(path)
    assert same(checkpoint)
    assert checkpoint["global_step"] == 3
    before = digest_of(path)
    write_folder(path, lambda part: write(part, 2.0))
    assert not same(read_checkpoint(path))
    assert digest_of(path) != before
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_no_damaged_file_of_a_folder_is_used(path) -> None:
    for file in sorted(path.iterdir()):
        if file.name == "digests.json":
            continue
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], content[:-9] + b"?" + content[-8:], b"", None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(UserError, match="can't be used"):
                check_checkpoint(path)
            file.write_bytes(content)
    check_checkpoint(path)
    (path / "digests.json").write_text("[")
    with pytest.raises(UserError, match="can't be used"):
        check_checkpoint(path)


def _blob(folder: Path, marker: Path) -> None:
    """Replace a pickled value in a shard by code."""
    with (folder / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    values = metadata.state_dict_metadata
    index = next(i for i in metadata.storage_data if isinstance(values[i.fqn], BytesStorageMetadata))
    place = metadata.storage_data[index]
    bomb = io.BytesIO()
    torch.save(Bomb(marker), bomb)
    file = folder / place.relative_path
    place.offset, place.length = file.stat().st_size, len(bomb.getvalue())
    file.write_bytes(file.read_bytes() + bomb.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


BOMBS = {
    ".metadata": lambda folder, marker: (folder / ".metadata").write_bytes(pickle.dumps(Bomb(marker))),
    "meta.pt": lambda folder, marker: torch.save(Bomb(marker), folder / "meta.pt"),
    "raw meta.pt": lambda folder, marker: (folder / "meta.pt").write_bytes(pickle.dumps(Bomb(marker))),
    "a shard": _blob,
}


class _Loading:
    """Lightning's strategies, which run what an index says."""

    def load_checkpoint(self, path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        pickle.loads((Path(path) / ".metadata").read_bytes())
        return torch.load(Path(path) / "meta.pt", weights_only=False)


class _Sharded(WholeCheckpoints, _Loading):
    pass


@pytest.mark.parametrize("place", BOMBS)
@pytest.mark.parametrize("use", [check_checkpoint, read_checkpoint, _Sharded().load_checkpoint])
def test_nothing_in_a_folder_is_run(path, place, use) -> None:
    other, marker = path.with_name("other"), path.with_name("ran")
    shutil.copytree(path, other)
    (other / "digests.json").unlink()  # whoever makes such a folder makes them too
    BOMBS[place](other, marker)
    with pytest.raises(UserError, match=r"can't be used .*give the one beside it.*last\.ckpt"):
        use(other)
    assert not marker.exists()


@pytest.mark.parametrize("at", range(1, 6))
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_one_or_the_new(path, at) -> None:
    if not (process := os.fork()):
        rename, remove, calls = Path.rename, shutil.rmtree, 0

        def counted(original: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return call

        Path.rename, shutil.rmtree = counted(rename), counted(remove)  # type: ignore[method-assign]
        write_folder(path, lambda part: write(part, 2.0))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -9
    assert same(read_checkpoint(restored(path))) == (at < 5)
    write_folder(path, write)
    assert same(read_checkpoint(path))
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
