"""One configuration's uninterrupted run beside runs of it that are interrupted."""

from __future__ import annotations

import csv
import shutil
import signal
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  (imported once, before forks)
import torch
from forked_runs import Kill, arm, as_two_ranks, count_calls, dskd_forked
from tiny_runs import write_config

from dskd_lightning.checkpoints import read_checkpoint
from dskd_lightning.checkpoints.folders import tensors_of

SFT = {"class_path": "dskd_lightning.objectives.SFTObjective"}
COUNTED = ("call", "in save", "command")
CLOCKS = {
    "monitor/tokens_per_second", "monitor/memory_gib", "monitor/data_wait", "train/samples_time_share",
}  # fmt: skip


class ComparedRun:
    """One configuration: the uninterrupted run, and copies that are killed.

    Args:
        folder: where they are.
        model_folder: makes the models.
        counted: the points of kills at a share of all calls, which are counted once.
        longer: options of a second fit, which goes on where the first ended; between the two a copy is
            tested and predicts, the uninterrupted run is not.
        changes: of the configuration.
    """

    def __init__(
        self,
        folder: Path,
        model_folder: Any,
        counted: Collection[str] = (),
        longer: tuple[str, ...] = (),
        **changes: Any,
    ) -> None:
        self.folder, self.longer = folder, longer
        teacher = model_folder(hidden=24, seed=2) if "model.objective" in changes else None
        defaults = {
            "model.objective": SFT,
            "trainer.max_epochs": 3,
            "completions": {"prompts": 0},
            "data.batch_size": 5,
        }
        self.sharded = isinstance(changes.get("trainer.strategy"), dict)
        self.config = write_config(folder, model_folder(seed=1), teacher, **{**defaults, **changes})
        self.whole = folder / "whole"
        paths = {point: folder / f"calls {point}" for point in COUNTED if point in counted}

        def prepare() -> None:
            for point, path in paths.items():
                count_calls(point, path)

        self.fit(self.whole, prepare=prepare)
        self.calls = {point: int(path.read_text()) for point, path in paths.items()}
        if longer:
            self.fit(self.whole, options=longer)

    def fit(
        self,
        run: Path,
        prepare: Callable[[], None] = lambda: None,
        expected: tuple[int, ...] = (0,),
        options: tuple[str, ...] = (),
    ) -> int:
        """Start, or resume where there is a checkpoint; see `dskd_forked`."""
        log = self.folder / f"{run.name}.log"
        start_over = not (run / "checkpoints" / "last.ckpt").exists()
        place = ("--overwrite", "true") if start_over else ("--ckpt_path", "last")
        if self.sharded:
            armed = prepare

            def prepare() -> None:
                armed()
                as_two_ranks()

        arguments = ("fit", "--config", str(self.config), "--output", str(run), *place, *options)
        status = dskd_forked(*arguments, log=log, prepare=prepare)
        assert status in expected, (status, log.read_text(errors="replace")[-3000:])
        return status

    def survives(self, chain: list[tuple[str, float]], name: str) -> int:
        """Kill, resume, kill ... and compare; returns how many kills struck.

        Half of the kills are of the second fit, where there is one.
        """
        run, kills = self.folder / name, 0
        half = len(chain) // 2 if self.longer else len(chain)
        for fit, part in enumerate((chain[:half], chain[half:]) if self.longer else (chain,)):
            options = self.longer if fit else ()
            for point, count in part:
                if point in COUNTED:
                    count = max(1, count * self.calls[point])
                kill = Kill(point, int(count))
                kills += self.fit(run, partial(arm, kill), (-signal.SIGKILL, 0), options) != 0
            self.fit(run, options=options)
            if self.longer and not fit:
                self._evaluate(run)
        self.check(run)
        return kills

    def _evaluate(self, run: Path) -> None:
        """Test and predict, which must leave no trace in the training that follows."""
        given = ("--config", str(self.config), "--output", str(run))
        log = self.folder / f"{run.name} evaluated.log"
        data = ("--data.predict", str(self.folder / "data.jsonl"), "--responses.limit", "2")
        for command in (("test", *given), ("predict", *given, *data, "--responses.seeds", "[3]")):
            assert dskd_forked(*command, log=log) == 0, log.read_text(errors="replace")[-3000:]
            shutil.rmtree(run / "predictions")  # they are of other prompts

    def check(self, run: Path) -> None:
        """Assert that a run ended as the uninterrupted one did."""
        for checkpoint in ("last", "best"):
            ours, theirs = (_contents(r / "checkpoints" / f"{checkpoint}.ckpt") for r in (run, self.whole))
            assert _differences(ours, theirs) == [], checkpoint
        assert _rows(run) == _rows(self.whole)


def _rows(run: Path) -> list[dict[str, str]]:
    """What training and validation logged."""
    with (run / "metrics.csv").open(newline="") as stream:
        rows = [{k: v for k, v in row.items() if v and k not in CLOCKS} for row in csv.DictReader(stream)]
    return [row for row in rows if not any(name.startswith("test/") for name in row)]


def _contents(path: Path) -> dict[str, Any]:
    """A checkpoint without what differs between runs: paths, clocks, counters of validation batches."""
    checkpoint: dict[str, Any] = read_checkpoint(path)
    if path.is_dir():
        checkpoint["optimizer"] = tensors_of(path, "optimizer_0.")
    scores = {"best_model_score", "kth_value", "latest_update_step"}
    callbacks = {
        name: {key: value for key, value in state.items() if key in scores}
        for name, state in checkpoint["callbacks"].items()
    }
    progress = checkpoint["loops"]["fit_loop"]
    progress = {key: value for key, value in progress.items() if "val_loop" not in key}
    return {**checkpoint, "callbacks": callbacks, "loops": progress}


def _differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    if isinstance(ours, torch.Tensor):
        return [] if isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs) else [place]
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return [f"{place}: {ours.keys() ^ theirs.keys()}"]
        return [d for key in ours for d in _differences(ours[key], theirs[key], f"{place}/{key}")]
    if isinstance(ours, list | tuple):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for i, (a, b) in pairs for d in _differences(a, b, f"{place}/{i}")]
    return [] if ours == theirs else [f"{place}: {ours} instead of {theirs}"]
