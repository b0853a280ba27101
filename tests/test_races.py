"""Two processes, ranks or machines at once: what happens between two steps of one of them is played here."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from dskd_lightning import UserError
from dskd_lightning.callbacks.csv_logger import ResumableCSVLogger
from dskd_lightning.checkpoints import (
    check_checkpoint,
    checks,
    digest_of,
    folders,
    read_checkpoint,
    read_identified,
    write_file,
)
from dskd_lightning.checkpoints.folders import restored, write_folder
from dskd_lightning.comparison.judge import judge_pairs
from dskd_lightning.data import preparation
from dskd_lightning.data.portions import Portion, Shelf
from dskd_lightning.evaluation import response_data
from dskd_lightning.evaluation.writer import PredictionWriter
from dskd_lightning.files import put_in_place, write_object
from dskd_lightning.launch import lightning_cli
from dskd_lightning.models import export
from dskd_lightning.planning.benchmark import Benchmark
from dskd_lightning.runs import lock, metrics_file
from dskd_lightning.runs.lock import locked, take_file
from dskd_lightning.runs.metrics_file import read_rows
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.study import study
from dskd_lightning.study.worker import run_variant
from dskd_lightning.teacher_cache import attach
from dskd_lightning.teacher_cache.build import StateBuilder


def once(action: Callable[[], object]) -> Callable[[], None]:
    done = False

    def act() -> None:
        nonlocal done
        if not done:
            done = True
            action()

    return act


def forked(action: Callable[[], object]) -> int:
    """The exit status of a process that does it: 0, or 1 where it raises `UserError`."""
    if (child := os.fork()) == 0:
        status = 2
        try:
            action()
            status = 0
        except UserError:
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save(path: Path, value: float) -> None:
    """A checkpoint folder of four files."""

    def write(part: Path) -> None:
        weights = {f"state_dict.w{number}": torch.full((1000,), value) for number in range(4)}
        writer = FileSystemWriter(part, single_file_per_rank=False)
        dcp.save(weights, storage_writer=writer, no_dist=True)
        torch.save({"global_step": int(value)}, part / "meta.pt")

    write_folder(path, write)


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 100)
    create, replaced, opened = FileSystem.create_stream, once(lambda: save(path, 200)), 0

    @contextmanager
    def create_stream(self: Any, name: Any, mode: str) -> Any:
        nonlocal opened
        if mode == "rb" and str(name).endswith(".distcp"):
            opened += 1
            if opened == 3:
                replaced()
        with create(self, name, mode) as stream:
            yield stream

    monkeypatch.setattr(FileSystem, "create_stream", create_stream)
    checkpoint = read_checkpoint(path)
    assert {value[0].item() for value in checkpoint["state_dict"].values()} == {200}
    assert checkpoint["global_step"] == 200


def test_a_folder_that_is_replaced_while_it_is_checked_is_not_called_damaged(tmp_path, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 100)
    check_folder, replaced = folders.check_folder, once(lambda: save(path, 200))

    def check(folder: Path) -> None:
        before = folders.folder_digest(folder)
        replaced()
        if folders.folder_digest(folder) != before:
            raise folders.DamagedError("the checksum of meta.pt differs")
        check_folder(folder)

    monkeypatch.setattr(checks, "check_folder", check)
    assert read_checkpoint(path)["global_step"] == 200


def test_a_reader_that_puts_the_old_folder_back_does_not_end_the_training(tmp_path, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 100)
    rename, looked = Path.rename, once(lambda: restored(path))

    def renamed(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if Path(target).name == ".last.ckpt.old":
            looked()
        return moved

    monkeypatch.setattr(Path, "rename", renamed)
    save(path, 200)
    assert read_checkpoint(path)["global_step"] == 200
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_is_named_by_the_content_that_was_read(tmp_path, monkeypatch, kind: str) -> None:
    path = tmp_path / "last.ckpt"

    def write(value: int) -> None:
        if kind == "folder":
            save(path, value)
        else:
            write_file({"state_dict": {"w": torch.full((10,), value)}, "global_step": value}, path)

    write(100)
    name, replaced = f"load_{kind}", once(lambda: write(200))
    load = getattr(checks, name)

    def loaded(*arguments: Any) -> dict[str, Any]:
        content: dict[str, Any] = load(*arguments)
        replaced()
        return content

    monkeypatch.setattr(checks, name, loaded)
    content, digest = read_identified(path)
    assert (content["global_step"], digest) == (200, digest_of(path))


def test_a_folder_that_is_replaced_during_a_check_alone_is_not_called_damaged(tmp_path, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 100)
    sha256, replaced = folders._sha256, once(lambda: save(path, 200))

    def hashed(file: Path) -> str:
        if file.suffix == ".distcp":
            replaced()
        return sha256(file)

    monkeypatch.setattr(folders, "_sha256", hashed)
    assert check_checkpoint(path) == digest_of(path)


def rows(folder: Path, values: dict[int, float], resume: bool = False) -> ResumableCSVLogger:
    logger = ResumableCSVLogger(folder, resume=resume)
    for step, value in values.items():
        logger.log_metrics({"loss": value}, step)
    logger.save()
    return logger


@pytest.mark.parametrize("more", [{"loss": 0.5}, {"loss": 0.5, "new": 1.0}], ids=["appended", "rewritten"])
def test_curves_may_be_read_while_a_run_writes_them(tmp_path, monkeypatch, more) -> None:
    logger, check = rows(tmp_path, {1: 1.0}), metrics_file._note

    def write() -> None:
        logger.log_metrics(more, 2)
        logger.save()

    written = once(write)

    def note(path: Path) -> bytes | None:
        found = check(path)
        written()
        return found

    read_bytes = Path.read_bytes

    def content(self: Path) -> bytes:
        found = read_bytes(self)
        if self.name == "metrics.csv":
            written()
        return found

    monkeypatch.setattr(Path, "read_bytes", content)
    assert len(read_rows(tmp_path / "metrics.csv")) == 2
    written = once(write)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(metrics_file, "_note", note)
    assert len(read_rows(tmp_path / "metrics.csv")) == 3


def test_rows_of_a_run_that_ended_meanwhile_are_kept(tmp_path) -> None:
    earlier = rows(tmp_path, {1: 1.0})
    resumed = ResumableCSVLogger(tmp_path, resume=True)
    earlier.log_metrics({"loss": 0.5}, 2)
    earlier.save()
    resumed.log_metrics({"loss": 0.4}, 3)
    resumed.save()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["1", "2", "3"]


def prediction(index: int) -> Prediction:
    return Prediction(index, "p", ("x",), "r", 10, 1)


def test_two_that_generate_the_same_do_not_mix(tmp_path) -> None:
    path = tmp_path / "seed_10.jsonl"
    first, second = PredictionWriter(path), PredictionWriter(path)
    first.append([prediction(0)])
    with pytest.raises(UserError, match="partial-0: another process still writes it"):
        second.append([prediction(0)])
    with pytest.raises(UserError, match="another process still writes it"):
        PredictionWriter(path, rank=1)
    first.append([prediction(1)])
    assert len(first.finish([0, 1])) == 2


def test_a_rank_that_goes_on_after_its_run_was_killed_is_told(tmp_path) -> None:
    path = tmp_path / "seed_10.jsonl"
    orphan = PredictionWriter(path, rank=1)
    orphan.append([prediction(1)])
    with pytest.raises(UserError, match="partial-1: another process still writes it"):
        PredictionWriter(path)
    orphan.close()
    assert PredictionWriter(path).done.keys() == {1}


def test_ranks_may_look_at_each_others_files_at_once(tmp_path) -> None:
    path = tmp_path / "seed_10.jsonl"
    with PredictionWriter(path, rank=1) as writer:
        writer.append([prediction(1)])
    with path.with_name(f"{path.name}.partial-1").open("rb") as looked_at:
        assert take_file(looked_at, shared=True)
        assert PredictionWriter(path).done.keys() == {1}


class _Model:
    def __init__(self, name: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.name, self.meanwhile = name, meanwhile

    def save_pretrained(self, folder: Path) -> None:
        Path(folder, "weights").write_text(self.name)
        self.meanwhile()


def test_an_export_does_not_take_the_place_of_one_that_was_faster(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "_write_end_tokens", lambda *_: None)
    tokenizer: Any = SimpleNamespace(save_pretrained=lambda _: None)
    target = tmp_path / "student"

    def put(name: str, meanwhile: Callable[[], object] = lambda: None, overwrite: bool = False) -> None:
        model: Any = _Model(name, meanwhile)
        export.export_student(model, tokenizer, target, overwrite=overwrite)

    with pytest.raises(UserError, match="isn't empty"):
        put("slower", lambda: put("faster"))
    assert (target / "weights").read_text() == "faster"
    put("newest", overwrite=True)
    assert (target / "weights").read_text() == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_folder_that_another_has_put_in_place_stays(tmp_path) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(name)
    assert put_in_place(tmp_path / "theirs", tmp_path / "there")
    assert not put_in_place(tmp_path / "mine", tmp_path / "there")
    assert (tmp_path / "there" / "of").read_text() == "theirs"
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "mine", tmp_path / "nowhere" / "there")


def test_prepared_data_that_come_while_they_are_looked_for_are_whole(tmp_path, monkeypatch) -> None:
    folder, exists = tmp_path / "data", Path.exists

    def publish() -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "report.json").write_text("{}")
        (tmp_path / "made").rename(folder)

    published, is_file = once(publish), Path.is_file

    def after(look: Callable[[Path], bool]) -> Callable[[Path], bool]:
        def looked(self: Path) -> bool:
            found = look(self)
            if self in (folder, folder / "report.json"):
                published()
            return found

        return looked

    monkeypatch.setattr(Path, "exists", after(exists))
    monkeypatch.setattr(Path, "is_file", after(is_file))
    assert not preparation._is_there(folder)
    assert preparation._is_there(folder)


def test_machines_may_begin_with_a_folder_at_once(tmp_path, monkeypatch) -> None:
    shelf, mkdir = Shelf(tmp_path), Path.mkdir
    other = once(lambda: (Shelf(tmp_path).clear(), Shelf(tmp_path).publish(Portion(0, 0, 1, 2, ("x",)))))

    def made(self: Path, *arguments: Any, **options: Any) -> None:
        other()
        mkdir(self, *arguments, **options)

    for _ in range(2):
        shelf.clear()
    monkeypatch.setattr(Path, "mkdir", made)
    shelf.clear()
    assert shelf.portions() == []


def test_an_unfinished_shard_may_be_finished_while_it_is_looked_at(tmp_path, monkeypatch) -> None:
    unfinished, old = tmp_path / ".shard-00003.abc", tmp_path / ".shard-00004.abc"
    for path in (unfinished, old):
        path.write_text("x")
    os.utime(old, (1, 1))
    now, published = time.time(), once(lambda: unfinished.rename(tmp_path / "shard-00003"))

    def clock() -> float:
        published()
        return now

    monkeypatch.setattr("dskd_lightning.teacher_cache.build.time", SimpleNamespace(time=clock))
    StateBuilder._remove_leftovers(SimpleNamespace(folder=tmp_path))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00003"]


def test_the_last_summary_of_a_study_tells_of_all_that_is_finished(tmp_path, monkeypatch) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("{}")
    output, told = tmp_path / "out", tmp_path / "told"
    told.mkdir()
    of_two = study.Study(output, (base,), (study.Variant("a"), study.Variant("b")))

    def run(name: str, _: object, folder: Path, settings: str, *__: object) -> None:
        write_object(
            Path(folder) / "variant.json", {"settings": settings, "trained": True, "test": {"kl": 1}}
        )

    def summarise(_: Path, runs: dict[str, Path], **__: object) -> None:
        (told / "begun").touch()
        while first and not (told / "b finished").exists():  # the other worker finishes its variant meanwhile
            time.sleep(0.01)
        if first:
            time.sleep(0.3)  # in which it would write its summary
        write_object(told / "summary.json", {"runs": sorted(runs)})

    monkeypatch.setattr(study, "run_process", run)
    monkeypatch.setattr(study, "summarise", summarise)
    first = True
    if not (worker := os.fork()):
        of_two.run(only=["a"])
        os._exit(0)
    while not (told / "begun").exists():
        time.sleep(0.01)
    first, finish = False, study.Study._run_variant

    def finished(*arguments: Any) -> None:
        finish(*arguments)
        (told / "b finished").touch()

    monkeypatch.setattr(study.Study, "_run_variant", finished)
    of_two.run(only=["b"])
    assert os.waitpid(worker, 0)[1] == 0
    assert json.loads((told / "summary.json").read_text())["runs"] == ["a", "b"]


def test_a_second_benchmark_leaves_the_plan_of_the_first(tmp_path, monkeypatch) -> None:
    benchmark = Benchmark("teacher", "student", "data", tmp_path, 60.0)

    def touched(_: object) -> None:
        raise AssertionError("planned anew")

    monkeypatch.setattr(Benchmark, "_plan", touched)
    with locked(tmp_path / ".locks" / ".benchmark", "held"):
        assert forked(lambda: benchmark.run(overwrite=True)) == 1
    assert not (tmp_path / "benchmark.json").exists()


def test_a_variant_is_not_trained_in_a_folder_in_which_another_command_works(tmp_path, capfd) -> None:
    with (tmp_path / ".lock").open("w") as held:
        assert take_file(held)
        child = os.fork()
        if not child:
            try:
                run_variant(["--nonsense"], str(tmp_path), "", True, False)
            except SystemExit as stop:
                os._exit(int(stop.code or 0))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert "another process works in" in capfd.readouterr().err


def test_nobody_pays_for_a_verdict_twice(tmp_path) -> None:
    path = tmp_path / "verdicts.jsonl"
    answers = [prediction(0)]

    class Endpoint:
        def complete(self, *_: str) -> SimpleNamespace:
            assert forked(lambda: judge_pairs(self, answers, answers, path)) == 1  # type: ignore[arg-type]
            return SimpleNamespace(text="[[A]]", tokens=1)

    judge_pairs(Endpoint(), answers, answers, path)  # type: ignore[arg-type]
    assert len(path.read_text().splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["verdicts.jsonl"]


def test_a_file_of_responses_has_one_writer(tmp_path) -> None:
    output = tmp_path / "answers.jsonl"

    def write() -> None:
        with response_data._held(output):
            pass

    with response_data._held(output):
        assert forked(write) == 1
    assert forked(write) == 0
    assert not list(tmp_path.iterdir())


def test_ranks_look_again_where_a_cache_was_completed_between_their_looks(tmp_path, monkeypatch) -> None:
    cache: Any = SimpleNamespace(folder=tmp_path / "cache")
    looks = iter([False, True])
    monkeypatch.setattr(attach, "is_complete", lambda _: next(looks))
    monkeypatch.setattr(attach, "gathered", lambda mine: [mine, []])  # the other rank looked later
    assert attach._missing([cache], tmp_path) == []
    looks = iter([False, False])
    with pytest.raises(UserError, match="not every node sees the same"):
        attach._missing([cache], tmp_path)


def test_a_lock_that_another_machine_has_deleted_is_taken_anew(tmp_path, monkeypatch) -> None:
    def stale(_: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        same = lock._is(0, tmp_path)
    assert not same


def test_a_job_that_was_killed_while_it_saved_resumes(tmp_path, monkeypatch) -> None:
    save(tmp_path / "last.ckpt", 100)
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lightning_cli._is_requeued(tmp_path)
