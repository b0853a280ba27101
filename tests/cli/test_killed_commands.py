"""Commands that are killed where they write, and called again, leave what one call would have left."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked_runs import dskd_forked
from tiny_runs import write_config, write_data

from dskd_lightning.files import write_atomic
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.study import Study, summary, worker
from dskd_lightning.teacher_cache import build

WRITES = ("fsync", "replace", "rename", "rmdir")
"""What every file and folder passes that is to last; a kill strikes before one of these calls."""


def count_writes(path: Path, kill_at: int | None = None) -> None:
    """From now on add a byte to ``path`` at each of `WRITES`, or kill this process group before one."""
    log, passed = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 0

    def counted(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        nonlocal passed
        passed += 1
        os.write(log, b"x")
        if passed == kill_at:
            os.killpg(0, signal.SIGKILL)
        return original(*arguments, **options)

    for name in WRITES:
        setattr(os, name, partial(counted, getattr(os, name)))


def contents(folder: Path) -> dict[str, Any]:
    """What is in a folder's files, but for hidden ones, and those that tell of time or of the machine."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_dir() or hidden or path.stem in ("environment", "known") or "tensorboard" in name:
            continue
        found[name] = path.read_bytes()
    return found


@dataclass
class Killed:
    """One command, uninterrupted in one folder and killed in another.

    Args:
        folder: of the test.
        command: the command line, of the folder that it writes to.
        start: a folder that both begin as copies of; None for none.
        prepare: called in each process first.
    """

    folder: Path
    command: Callable[[Path], Sequence[str]]
    start: Path | None = None
    prepare: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        assert not self._call("whole")
        self.writes = (self.folder / "whole.writes").stat().st_size
        self.whole = contents(self.folder / "whole")
        assert self.whole

    def _call(self, name: str, kill_at: int | None = None) -> bool:
        """Whether it was killed."""
        place, log, count = (self.folder / f"{name}{suffix}" for suffix in ("", ".log", ".writes"))
        if self.start is not None and not place.exists():
            shutil.copytree(self.start, place)

        def prepare() -> None:
            self.prepare()
            count_writes(count, kill_at)

        status = dskd_forked(*self.command(place), log=log, prepare=prepare)
        assert status in (0, -signal.SIGKILL), (status, log.read_text(errors="replace")[-3000:])
        return status != 0

    def survives(self, *shares: float, name: str = "cut") -> int:
        """Kill call after call at shares of a whole call's writes, and compare the end.

        Returns:
            How many kills struck.
        """
        kills = sum(self._call(name, max(1, round(share * self.writes))) for share in shares)
        assert not self._call(name)
        assert contents(self.folder / name) == self.whole
        return kills


SFT = {"class_path": "dskd_lightning.objectives.SFTObjective"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    changes = {
        "model.objective": SFT,
        "trainer.max_epochs": 1,
        "trainer.logger": False,
        "completions": {"prompts": 0},
        "responses.seeds": [1, 2],
        "responses.batch_size": 2,
        "responses.efficiency": False,
    }
    config = write_config(folder, model_folder(seed=1), None, **changes)
    assert dskd_forked("fit", "--config", str(config), log=folder / "log") == 0
    return folder


def evaluation(trained: Path, command: str) -> Callable[[Path], Sequence[str]]:
    data = ("--data.predict", str(trained / "data.jsonl"), "--responses.limit", "5")
    given = ("--config", str(trained / "config.yaml"), *(data if command == "predict" else ()))
    return lambda place: (command, *given, "--output", str(place))


def small_shards() -> None:
    build._SHARD_TOKENS = 40


def fake_training() -> None:
    """A study's variants are numbers here, written as a worker writes them."""

    def process(
        self: Study, variant: Any, folder: Path, settings: str, point: dict[str, Any], test: bool
    ) -> None:
        lr = point.get("lr", variant.config.get("lr"))
        result = worker.read_result(folder)
        if result is None:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "checkpoints" / "best.ckpt", str(lr))
            result = {"settings": settings, "trained": True, "validation": {"val/nll_per_byte": lr}}
            write_atomic(folder / worker.DONE, json.dumps(result))
        if test:
            result["test"] = {"kl": float((folder / "checkpoints" / "best.ckpt").read_text())}
            write_atomic(folder / worker.DONE, json.dumps(result))

    Study._process = process  # type: ignore[method-assign]
    summary._plot = lambda *_: None  # type: ignore[assignment]


def made(name: str, folder: Path, trained: Path, model_folder: Any) -> Killed:
    """One of the commands, with what it needs."""
    if name in ("test", "predict"):
        return Killed(folder, evaluation(trained, name), trained / "run")
    if name == "compare":
        for run, response in (("one", "yes"), ("two", "no")):
            lines = [Prediction(i, "p", ("yes",), response, seed=1).to_json() + "\n" for i in range(5)]
            write_atomic(folder / run / "predictions" / "seed_1.jsonl", "".join(lines))
        runs = [str(folder / run) for run in ("one", "two")]
        return Killed(folder, lambda place: ("compare", *runs, "--output", str(place)))
    if name == "generate":
        data, options = write_data(folder / "data.jsonl", 8), ("--max_new_tokens", "12", "--batch_size", "2")
        options = (*options, "--samples_per_prompt", "2", "--seed", "5", "--likeliest", "1")
        student = model_folder(seed=1)
        return Killed(
            folder, lambda place: ("generate", student, str(data), str(place / "a.jsonl"), *options)
        )
    if name == "study":
        study = {
            "base": ["base.yaml"],
            "report": False,
            "variants": {"a": {"config": {"lr": 0.3}}, "b": {"grid": {"lr": [0.2, 0.1, 0.3]}}},
        }
        (folder / "base.yaml").write_text("seed_everything: 1\n")
        (folder / "s.yaml").write_text(yaml.safe_dump(study))
        return Killed(
            folder,
            lambda place: ("study", str(folder / "s.yaml"), "--output", str(place)),
            None,
            fake_training,
        )
    config = write_config(folder, model_folder(seed=1), model_folder(hidden=24, seed=2))

    def cache(place: Path) -> tuple[str, ...]:
        text = yaml.safe_load(config.read_text())
        text["data"]["cache_dir"] = str(place)
        (folder / f"{place.name}.yaml").write_text(yaml.safe_dump(text))
        return ("cache", str(folder / f"{place.name}.yaml"))

    return Killed(folder, cache, None, small_shards)


CHAINS = {
    "cache": (0.0, 0.5),
    "test": (0.5, 0.3),
    "predict": (0.3, 0.6),
    "generate": (0.3, 0.6, 0.3),
    "compare": (0.3, 0.7),
    "study": (0.2, 0.5, 0.3, 0.2),
}
"""The cache's first write is of prepared data."""


@pytest.mark.parametrize("name", CHAINS)
def test_killed_commands_end_as_if_they_had_not_been(tmp_path, trained, model_folder, name) -> None:
    killed = made(name, tmp_path, trained, model_folder)
    assert killed.survives(*CHAINS[name]) == len(CHAINS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_commands_killed_at_every_write(tmp_path, trained, model_folder, name) -> None:
    killed = made(name, tmp_path, trained, model_folder)
    points = range(1, killed.writes + 1)
    kills = sum(killed.survives(at / killed.writes, name=f"cut {at}") for at in points)
    assert kills >= 2 * len(points) // 3  # later calls find the data prepared and write less
