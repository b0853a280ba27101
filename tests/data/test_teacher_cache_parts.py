"""A cache that several jobs compute: the same shards as one job's, and what is missing is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_runs import write_config

from dskd_lightning.cli.main import main
from dskd_lightning.errors import UserError
from dskd_lightning.runs.lock import locked
from dskd_lightning.runs.parts import Part
from dskd_lightning.teacher_cache import build


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_SHARD_TOKENS", 20)


@pytest.fixture
def config(tmp_path: Path, model_folder: Callable[..., str]) -> Path:
    changes = {"data.teacher_cache": {"dtype": "float32"}, "data.val_split": 0, "data.test_split": 0}
    return write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **changes)


def cache(config: Path, output: Path, *options: str) -> int:
    return main(["cache", str(config), "--output", str(output), *options])


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*/shard-*")}


def test_parts_in_one_folder_are_the_whole(config: Path, tmp_path: Path, capsys) -> None:
    assert cache(config, tmp_path / "whole") == 0
    whole = shards(tmp_path / "whole")
    assert len(whole) > 3
    for number in (1, 2, 3):
        assert cache(config, tmp_path / "parts", "--part", f"{number}/3") == 0
        assert f"part {number} of 3 of the teacher cache complete in" in capsys.readouterr().out
        here = sorted(int(name[6:11]) for name in shards(tmp_path / "parts"))
        assert here == [shard for shard in range(len(whole)) if shard % 3 < number]
    assert shards(tmp_path / "parts") == whole
    stamps = [path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*/shard-*")]
    assert cache(config, tmp_path / "parts") == 0  # nothing is left to compute
    assert stamps == [path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*/shard-*")]


def test_parts_of_several_folders_are_joined(config: Path, tmp_path: Path, capsys) -> None:
    assert cache(config, tmp_path / "whole") == 0
    for number in (1, 2, 3):
        assert cache(config, tmp_path / str(number) / "teacher-states", "--part", f"{number}/3") == 0
    joined = tmp_path / "joined"
    capsys.readouterr()
    assert cache(config, joined, "--join", str(tmp_path / "1"), str(tmp_path / "3")) == 2
    assert "part 2 of 3 of the cache of" in capsys.readouterr().err
    assert 0 < len(shards(joined)) < len(shards(tmp_path / "whole"))  # what there is stays
    places = [str(tmp_path / name) for name in ("2/teacher-states", "3", "1")]
    assert cache(config, joined, "--join", *places) == 0
    assert shards(joined) == shards(tmp_path / "whole")


def test_doubled_and_missing_shards_are_named(config: Path, tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        assert cache(config, tmp_path / name, "--part", "1/2") == 0
    (folder,) = (path for path in (tmp_path / "a").iterdir() if path.is_dir())
    for note in tmp_path.glob("[ab]/*/part-*"):
        note.unlink()
    count = len(json.loads((folder / "manifest.json").read_text())) and len(list(folder.glob("shard-*")))
    capsys.readouterr()
    assert cache(config, tmp_path / "joined", "--join", str(tmp_path / "a"), str(tmp_path / "b")) == 2
    said = capsys.readouterr().err
    assert f"{count} shards copied" in said
    assert "shards 0, 2" in said.split("copied to")[1].split("several folders")[0]
    assert "shards 1, 3" in said.split("--join: ")[1]


def test_what_was_computed_otherwise_is_refused(
    config: Path, tmp_path: Path, model_folder: Callable[..., str], capsys
) -> None:
    assert cache(config, tmp_path / "mine", "--part", "1/2") == 0
    other = tmp_path / "other"
    other.mkdir()
    changes = {"data.teacher_cache": {"dtype": "float32"}, "data.val_split": 0, "data.test_split": 0}
    strange = write_config(other, model_folder(seed=1), model_folder(hidden=24, seed=3), **changes)
    assert cache(strange, tmp_path / "theirs", "--part", "2/2") == 0
    capsys.readouterr()
    assert cache(config, tmp_path / "joined", "--join", str(tmp_path / "mine"), str(tmp_path / "theirs")) == 2
    assert "holds no part of the cache" in (said := capsys.readouterr().err)
    assert "the nearest one differs in: teacher" in said
    assert cache(config, tmp_path / "joined", "--join", str(tmp_path / "nowhere")) == 2
    assert "(no cache lies there)" in capsys.readouterr().err
    # The same source, but loaded as something else.
    shutil.copytree(tmp_path / "mine", tmp_path / "bent")
    (manifest,) = (tmp_path / "bent").glob("*/manifest.json")
    values = json.loads(manifest.read_text())
    values.pop("crc32", None)
    manifest.write_text(json.dumps(values | {"weights": "0" * 64}))
    assert cache(config, tmp_path / "joined", "--join", str(tmp_path / "mine"), str(tmp_path / "bent")) == 2
    assert "was computed with other weights" in capsys.readouterr().err
    (shard, *_) = (tmp_path / "mine").glob("*/shard-*")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert cache(config, tmp_path / "again", "--join", str(tmp_path / "mine")) == 2
    assert "its checksum differs" in capsys.readouterr().err
    assert not (next((tmp_path / "again").glob("*/")) / shard.name).exists()


def test_two_jobs_do_not_compute_the_same_part(config: Path, tmp_path: Path, capsys) -> None:
    assert cache(config, tmp_path / "parts", "--part", "1/2") == 0
    (folder,) = (path for path in (tmp_path / "parts").iterdir() if path.is_dir())
    capsys.readouterr()
    with locked(folder / ".part-00002-of-00002.lock", ""):
        assert cache(config, tmp_path / "parts", "--part", "2/2") == 2
        assert "another job computes part 2 of 2" in capsys.readouterr().err
    assert cache(config, tmp_path / "parts", "--part", "2/2") == 0


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write 3/16 for the third of sixteen"):
        Part.parse(text)


@pytest.mark.parametrize("option", [("--join", "x"), ("--estimate", "true")])
def test_a_part_is_computed_and_nothing_else(
    config: Path, tmp_path: Path, capsys, option: tuple[str, str]
) -> None:
    assert cache(config, tmp_path / "x", "--part", "1/2", *option) == 2
    assert "give one of them" in capsys.readouterr().err


def test_processes_of_jobs_share_as_one_job_of_all() -> None:
    taken = [Part(number, 3).rank(rank, 2) for number in (1, 2, 3) for rank in (0, 1)]
    assert taken == [(rank, 6) for rank in range(6)]


def test_a_part_wants_room_for_itself_alone_and_says_what_it_computes(
    config: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    assert cache(config, tmp_path / "whole") == 0
    tokens = sum(map(len, shards(tmp_path / "whole").values()))
    monkeypatch.setattr(build, "_SPARE_BYTES", 0)
    room = SimpleNamespace(free=tokens // 2)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda folder: room)
    capsys.readouterr()
    assert cache(config, tmp_path / "part", "--part", "1/3") == 0
    count = len(shards(tmp_path / "part"))
    assert f"{count} of {count} shards are missing of part 1 of 3" in capsys.readouterr().err
    assert cache(config, tmp_path / "all") == 2  # which the room isn't enough for


def test_the_first_batch_tells_how_long_it_takes(config: Path, tmp_path: Path, capsys) -> None:
    assert cache(config, tmp_path / "whole") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Teacher cache: ")]
    first, last = said[0], said[-1]
    assert "(100%)" not in first
    assert first.endswith(" left")
    assert "(100%)" in last
