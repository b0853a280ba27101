"""Training files that come and go on a bounded disk: nothing lost or doubled, the same order after a kill."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from file_server import FileServer, serving

from dskd_lightning import InstructionDataModule, StudentSpec, TeacherSpec, UserError
from dskd_lightning.callbacks.prompts import prompt_records
from dskd_lightning.data import ahead
from dskd_lightning.data.portions import Place, Portion, Shelf, order_of_files
from dskd_lightning.data.preparation import remove_abandoned
from dskd_lightning.data.rolling import RollingLoader
from dskd_lightning.files import read_object
from dskd_lightning.planning.calculator.disk import disk
from dskd_lightning.planning.calculator.shapes import Layout, Losses, ModelSize
from dskd_lightning.planning.run_sizes import data_size

FILES, ROWS, BATCH = 9, 10, 4
Made = Callable[..., InstructionDataModule]


def rows_of(file: int, rows: int = ROWS) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"File {file}, row {row}?",
            "response": "number " * (1 + (row + file) % 5) + f"{file}-{row}",
        }
        for row in range(rows)
    ]


def lines_of(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def bytes_of(root: Path) -> int:
    """Of prepared files, also of unfinished ones."""
    folders = [path for path in root.iterdir() if path.name not in ("portions", "readers") and path.is_dir()]
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


class _Stopped(Exception):
    pass


class _Thread:
    """Instead of the process, whose start takes seconds: the same `Preparer` in a thread."""

    def __init__(self, job: ahead.AheadJob) -> None:
        self.preparer, self.stopping = ahead.Preparer(pickle.loads(pickle.dumps(job))), threading.Event()
        slowest = self.preparer.shelf.slowest

        def looked_up() -> Place | None:
            if self.stopping.is_set():
                raise _Stopped
            return slowest()

        self.preparer.shelf.slowest = looked_up  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.preparer.run()
        except UserError as error:
            self.preparer.shelf.fail(str(error))
        except _Stopped:
            pass

    def poll(self) -> int | None:
        return None if self.thread.is_alive() else 1

    def kill(self) -> None:
        self.stopping.set()
        self.thread.join(10)

    communicate = poll


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dskd_lightning.data.rolling_files.start_ahead", _Thread)
    monkeypatch.setattr(ahead, "_LOOK", 0.01)


@pytest.fixture
def make(tmp_path: Path, model_folder: Any) -> Iterator[Made]:
    """``make(files=2.5)``: data whose limit leaves room for so many files in each portion."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file in range(FILES):
        (folder / f"{file}.jsonl").write_text(lines_of(rows_of(file)))
    source = model_folder()
    made: list[InstructionDataModule] = []

    one = InstructionDataModule(
        str(folder / "0.jsonl"), student=StudentSpec(source), teacher=TeacherSpec(source),
        max_length=96, max_prompt_length=40, cache_dir=str(tmp_path / "one"),
    )  # fmt: skip
    size = sum(file.stat().st_size for file in one.examples("train").dataset.folder.iterdir())

    def stop() -> None:
        for data in made:
            if isinstance(data._train_loader, RollingLoader):
                data._train_loader.stop()

    def make(files: float = 2.5, train: Any = str(folder), **more: Any) -> InstructionDataModule:
        settings: dict[str, Any] = {
            "student": StudentSpec(source), "teacher": TeacherSpec(source), "max_length": 96,
            "max_prompt_length": 40, "batch_size": BATCH, "cache_dir": str(tmp_path / "cache"),
            "disk_limit_gb": 4 * files * size / 2**30, "num_proc": 1,
        }  # fmt: skip
        stop()
        made.append(InstructionDataModule(train, **{**settings, **more}))
        return made[-1]

    yield make
    stop()


def texts(batch: Any, data: InstructionDataModule) -> list[str]:
    """The responses of a batch, with which the made files tell rows apart."""
    decode = data.student_tokenizer.decode
    return [decode(row[row >= 0], skip_special_tokens=True) for row in batch.student.labels]


def together(batches: Iterable[list[str]]) -> list[str]:
    return sorted(itertools.chain.from_iterable(batches))


def passes(data: InstructionDataModule, batches: Iterable[Any]) -> Iterator[list[list[str]]]:
    """The batches of all files, again and again."""
    found: list[list[str]] = []
    for batch in batches:
        found.append(texts(batch, data))
        if sum(map(len, found)) == FILES * ROWS:
            yield found
            found = []


def read(data: InstructionDataModule) -> list[list[str]]:
    return next(passes(data, data.train_dataloader()))


ALL = sorted(row["response"] for file in range(FILES) for row in rows_of(file))


def test_each_epoch_reads_every_example_once_within_the_limit(threads, make, monkeypatch) -> None:
    data, sizes, largest = make(files=1.3), [], []
    prepared = ahead.prepared_folder

    def measured(sources, renderers, settings, root, *more):
        made = prepared(sources, renderers, settings, root, *more)
        sizes.append(bytes_of(root))
        return made

    monkeypatch.setattr(ahead, "prepared_folder", measured)
    loader = data.train_dataloader()
    assert isinstance(loader, RollingLoader)

    def noted() -> Iterator[Any]:
        for batch in loader:
            largest.append(len(list((loader.shelf.root / "portions").glob("*.json"))))
            yield batch

    epochs = list(itertools.islice(passes(data, noted()), 3))
    assert all(together(batches) == ALL for batches in epochs)
    assert len({json.dumps(batches) for batches in epochs}) == 3
    assert len(sizes) > 2 * FILES, "files were taken away and prepared again"
    assert max(sizes) <= data.rolling.job.limit < 2 * max(sizes)
    assert max(largest) == 2
    assert data.report["train"]["used"] == data.report["train"]["examples"] == FILES * ROWS


def test_examples_of_a_portion_are_mixed(threads, make) -> None:
    first = read(make())[0]
    assert len({text.rpartition(" ")[2].partition("-")[0] for text in first}) > 1


def test_batches_do_not_depend_on_who_is_faster(threads, make, monkeypatch) -> None:
    data = make()
    expected = list(itertools.islice(passes(data, data.train_dataloader()), 2))
    prepared = ahead.prepared_folder

    def slow(*given):
        time.sleep(0.03)
        return prepared(*given)

    def slowly(batches: Iterable[Any]) -> Iterator[Any]:
        draw = random.Random(3)
        for batch in batches:
            time.sleep(draw.random() / 50)
            yield batch

    monkeypatch.setattr(ahead, "prepared_folder", slow)
    data = make(num_proc=2, num_workers=1)
    assert list(itertools.islice(passes(data, slowly(data.train_dataloader())), 2)) == expected


class _Rank:
    """As much of a Trainer as data ask for; a batch is finished when it was handed out."""

    overfit_batches, limit_train_batches, world_size = 0, 40, 2

    def __init__(self, rank: int, folder: Path, world_size: int = 2) -> None:
        self.global_rank = self.local_rank = rank
        self.default_root_dir, self.world_size = str(folder), world_size


def at_rank(data: InstructionDataModule, folder: Path, rank: int = 0, world_size: int = 1) -> Any:
    """The loader of a run whose Trainer writes to ``folder``."""
    data.trainer = _Rank(rank, folder, world_size)  # type: ignore[assignment]
    finished = SimpleNamespace(total=SimpleNamespace(processed=0), current=None)
    data.trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=finished))
    if rank == 0:
        data.rolling.begin()
    data.rolling.shelf.say_reading(rank, None)
    loader = data.train_dataloader()
    loader._processed = None
    return loader


@pytest.mark.parametrize("left", ["all that was there", "nothing"])
def test_resumes_behind_any_batch(threads, make, left, tmp_path) -> None:
    data = make()
    loader = at_rank(data, tmp_path / "run")
    batches, states = [], []
    for batch in itertools.islice(loader, 45):  # into the second pass over the files
        batches.append(texts(batch, data))
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert {tuple(state["opened"][-1][0]) for state in states} > {(0, 0), (1, 0)}
    for done in range(1, len(batches), 3 if left == "nothing" else 7):
        data.on_exception(KeyboardInterrupt())
        if left == "nothing":
            shutil.rmtree(data.rolling.job.root)
        again = make()
        loader = at_rank(again, tmp_path / "run")
        assert again.rolling.job.root == data.rolling.job.root
        loader.load_state_dict(states[done - 1])
        assert loader.state_dict() == states[done - 1]  # before anything is read
        rest = itertools.islice(loader, len(batches) - done)
        assert [texts(batch, again) for batch in rest] == batches[done:], done
        data = again


def test_batches_that_were_finished_may_be_taken_again(threads, make, tmp_path) -> None:
    """As a step is that accumulates batches, where a run is killed within it."""
    data = make()
    loader = at_rank(data, tmp_path / "run")
    batches = [texts(batch, data) for batch in itertools.islice(loader, 30)]
    state = loader.state_dict()
    for again in (1, 5, 12):
        data.on_exception(KeyboardInterrupt())
        data = make()
        loader = at_rank(data, tmp_path / "run")
        loader.load_state_dict({**state, "done": 30 - again})
        assert [texts(batch, data) for batch in itertools.islice(loader, again)] == batches[-again:]


def test_a_second_fit_of_a_trainer_begins_anew(threads, make, tmp_path) -> None:
    data = make()
    loader = at_rank(data, tmp_path / "run")
    total = data.trainer.fit_loop.epoch_loop.batch_progress.total
    loader._processed = lambda: total.processed
    read: list[list[str]] = []

    def train(count: int) -> None:
        for batch in itertools.islice(loader, count):
            read.append(texts(batch, data))
            total.processed += 1

    train(13)
    loader = at_rank(data, tmp_path / "run")
    data.trainer.fit_loop.epoch_loop.batch_progress.total = total
    loader = data.train_dataloader()
    train(9)
    assert read[13:] == read[:9]
    state = loader.state_dict()
    data.on_exception(KeyboardInterrupt())
    data = make()
    at_rank(data, tmp_path / "run")
    data.trainer.fit_loop.epoch_loop.batch_progress.total = total
    loader = data.train_dataloader()
    loader.load_state_dict(state)
    train(4)
    assert read[22:] == read[9:13]


def test_who_prepares_has_ended_before_a_run_begins_again(threads, make, monkeypatch, tmp_path) -> None:
    data = make()
    loader = at_rank(data, tmp_path / "run")
    next(iter(loader))
    thread, clear, alive = loader._process.thread, Shelf.clear, []

    def cleared(shelf: Shelf) -> None:
        alive.append(thread.is_alive())
        clear(shelf)

    monkeypatch.setattr(Shelf, "clear", cleared)
    data.rolling.begin()
    assert alive == [False]


def test_what_goes_while_it_is_looked_up_was_never_there(monkeypatch, tmp_path) -> None:
    """Rank 0 begins anew while those who prepared for the other machines' ranks still look."""
    shelf = Shelf(tmp_path)
    shelf.clear()

    def too_late(path: Path, remedy: str) -> dict[str, Any]:
        path.unlink()
        return read_object(path, remedy)

    monkeypatch.setattr("dskd_lightning.files.read_object", too_late)
    looks = [lambda: shelf.slowest(), lambda: shelf.portion((0, 0)), lambda: shelf.portions()]
    for look, nothing in zip(looks, (None, None, []), strict=True):
        shelf.say_reading(0, (0, 0))
        shelf.publish(Portion(0, 0, 1, 1, ("a",)))
        assert look() == nothing
    shelf.fail("why")
    assert shelf.failure() is None


def test_what_comes_while_it_is_looked_up_is_there_at_the_next_look(monkeypatch, tmp_path) -> None:
    shelf, portion = Shelf(tmp_path), Portion(0, 0, 1, 1, ("a",))
    shelf.clear()

    def too_early(path: Path, remedy: str) -> dict[str, Any]:
        try:
            return read_object(path, remedy)
        finally:
            shelf.publish(portion)

    monkeypatch.setattr("dskd_lightning.files.read_object", too_early)
    assert shelf.portion((0, 0)) is None
    assert shelf.portion((0, 0)) == portion


def test_iterating_again_goes_on(threads, make) -> None:
    data = make()
    expected = read(data)
    data = make()
    loader = data.train_dataloader()
    found: list[list[str]] = []
    for count in (1, 6, 2, len(expected) - 9):
        found += [texts(batch, data) for batch in itertools.islice(loader, count)]
    assert found == expected
    with pytest.raises(TypeError, match="no end"):
        len(loader)


def test_what_is_left_of_a_killed_run_is_used(threads, make, monkeypatch, tmp_path) -> None:
    data = make()
    loader = at_rank(data, tmp_path / "run")
    iterator = iter(loader)
    for _ in range(8):
        next(iterator)
    state = loader.state_dict()
    assert state["opened"][-1][0][1] > 0
    root, deadline = loader.shelf.root, time.monotonic() + 20
    while len(loader.shelf.portions()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    data.on_exception(KeyboardInterrupt())
    (root / ("0" * 32)).mkdir(exist_ok=True)  # of something else
    there = {path.name for path in root.iterdir() if len(path.name) == 32}
    made = []
    prepared = ahead.prepared_folder

    def noted(*given):
        folder, is_new = prepared(*given)
        if is_new:
            made.append(folder.name)
        return folder, is_new

    monkeypatch.setattr(ahead, "prepared_folder", noted)
    loader = at_rank(make(), tmp_path / "run")
    loader.load_state_dict(state)
    assert len(list(itertools.islice(loader, 5))) == 5
    assert len(there & set(made)) == 0
    assert not (root / ("0" * 32)).exists()


def test_a_kill_within_taking_away_leaves_nothing_that_looks_prepared(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "0123"
    folder.mkdir()
    for name in ("report.json", "lengths.npy"):
        (folder / name).touch()

    def killed(path: Path) -> None:
        (path / "report.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            ahead._remove(folder)
    assert not folder.exists()
    shelf = Shelf(tmp_path)
    (left,) = shelf.prepared()  # to be taken away like anything that nobody reads
    assert left.name.startswith(".preparing-")
    ahead._remove(left)
    assert shelf.prepared() == []


def test_ranks_read_different_batches_at_their_own_pace(threads, make, tmp_path) -> None:
    found: dict[int, list[list[str]]] = {}
    failed = []
    ranks = [make() for _ in range(2)]
    loaders = [at_rank(data, tmp_path / "run", rank, 2) for rank, data in enumerate(ranks)]

    def run(rank: int) -> None:
        try:
            draw, data = random.Random(rank), ranks[rank]
            found[rank] = []
            for batch in itertools.islice(loaders[rank], 40):
                found[rank].append([text for text in texts(batch, data) if text])
                time.sleep(draw.random() / (10 if rank else 100))
        except BaseException as error:
            failed.append(error)

    running = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert not failed
    steps = [a + b for a, b in zip(found[0], found[1], strict=True)]
    sizes = list(itertools.accumulate(map(len, steps)))
    for number in (1, 2):
        end = sizes.index(number * FILES * ROWS) + 1
        assert together(steps[:end]) == sorted(ALL * number)


def test_a_bad_line_is_told_when_what_is_before_it_was_read(threads, make, tmp_path) -> None:
    last = order_of_files(FILES, 42, 0)[-1]
    path = tmp_path / "data" / f"{last}.jsonl"
    path.write_text(path.read_text() + '{"prompt": "broken\n')
    data = make()
    found: list[str] = []

    def training() -> None:
        for batch in data.train_dataloader():
            found.extend(texts(batch, data))

    with pytest.raises(UserError, match=rf"Malformed JSON at .*{last}\.jsonl:{ROWS + 1}"):
        training()
    assert len(found) >= (FILES - 3) * ROWS
    data._train_loader.stop()
    data = make(skip_invalid=True)
    assert together(read(data)) == ALL
    assert sum(n for name, n in data.report["train"].items() if name.startswith("skipped")) == 1


def test_files_without_examples_are_passed(threads, make, tmp_path) -> None:
    for file in order_of_files(FILES, 42, 0)[:-1]:
        (tmp_path / "data" / f"{file}.jsonl").write_text('{"prompt": "x"}\n')
    kept = order_of_files(FILES, 42, 0)[-1]
    data = make(skip_invalid=True)
    batches = itertools.islice(data.train_dataloader(), 6)
    assert together(texts(batch, data) for batch in batches) == sorted(
        2 * [row["response"] for row in rows_of(kept)]
    )
    (tmp_path / "data" / f"{kept}.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="No example is left of any training file"):
        read(make(skip_invalid=True))


def test_a_file_that_takes_too_much_is_named(threads, make, tmp_path) -> None:
    with pytest.raises(UserError, match=r"disk_limit_gb.*0\.jsonl.*split the file"):
        make(files=0.9).examples("train")
    (tmp_path / "data" / "5.jsonl").write_text(lines_of(rows_of(5, rows=60)))
    data = make()
    with pytest.raises(UserError, match=r"disk_limit_gb.*5\.jsonl.*split the file"):
        read(data)


def test_a_file_that_was_changed_since_the_checkpoint_is_refused(threads, make, tmp_path) -> None:
    data = make()
    loader = data.train_dataloader()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    loader.stop()
    first = order_of_files(FILES, 42, 0)[0]
    (tmp_path / "data" / f"{first}.jsonl").write_text(lines_of(rows_of(77)))
    data = make()
    loader = data.train_dataloader()
    loader.load_state_dict(state)
    with pytest.raises(UserError, match="other training data"):
        next(iter(loader))
    for other in (make(files=3), make(seed=1), make(train=str(tmp_path / "data" / "0.jsonl"))):
        with pytest.raises(UserError, match="other training files"):
            other.train_dataloader().load_state_dict(state)


def test_documents_in_any_file_are_refused_for_sampling(threads, make, tmp_path) -> None:
    last = order_of_files(FILES, 42, 0)[-1]
    data = make()
    data.check_prompts()
    (tmp_path / "data" / f"{last}.jsonl").write_text(json.dumps({"text": "A document. " * 9}) + "\n")
    with pytest.raises(UserError, match=rf"on_policy.*{last}\.jsonl"):
        read(data)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"val_split": 4}, "val_split.*files of their own"),
        ({"test_split": 0.1}, "test_split.*files of their own"),
        ({"limit": 5}, "limit"),
        ({"weights": {"x": 2}}, "weights"),
        ({"disk_limit_gb": 0}, "above 0"),
        ({"train": [{"prompt": "a", "response": "b"}]}, "in memory"),
    ],
)
def test_what_needs_all_data_together_is_refused(make, given, said) -> None:
    with pytest.raises(UserError, match=said):
        make(**given)


def test_whoever_must_see_all_examples_is_told(make) -> None:
    data = make(files=1.1)
    with pytest.raises(UserError, match=r"disk_limit_gb.*never on the disk together"):
        prompt_records(data, "train")
    with pytest.raises(UserError, match="never on the disk together"):
        data.first_epoch()
    assert len(data.examples("train")) == ROWS  # of the first file, for what looks at a few
    size = data_size(data)
    assert size.examples == FILES * ROWS
    model = ModelSize(
        parameters=100, trained=100, layers=1, hidden=4, vocabulary=9, weight_bytes=4.0, layered=64,
        attention=4, keys=4, wide=8,
    )  # fmt: skip
    found = [
        disk(model, [model], one, Losses(), Layout())["prepared data"]
        for one in (size, replace(size, disk_limit=None))
    ]
    assert found[0] == size.disk_limit == data.rolling.job.limit < found[1]


def test_data_behind_urls(threads, make, monkeypatch) -> None:
    monkeypatch.setattr("dskd_lightning.data.remote_faults._SECONDS", 0.5)
    monkeypatch.setattr("dskd_lightning.data.remote_faults._BACKOFF", 0.01)
    with serving(FileServer()) as server:
        for file in range(FILES):
            server.files[f"/{file}.jsonl"] = lines_of(rows_of(file)).encode()
        urls = [f"{server.url}/{file}.jsonl" for file in range(FILES)]
        data = make(train=urls)
        loader = data.train_dataloader()

        def faulty() -> Iterator[Any]:
            for batch in loader:
                server.faults[:] = ["cut", "stall", "drop", 503]
                yield batch

        assert together(next(passes(data, faulty()))) == ALL


def test_the_process_is_missed_and_its_end_told(make) -> None:
    data = make()
    loader = data.train_dataloader()
    assert isinstance(loader, RollingLoader)
    found: list[str] = []

    def training() -> None:
        for batch in loader:
            found.extend(texts(batch, data))
            assert loader._process is not None
            loader._process.kill()

    with pytest.raises(UserError, match=r"has ended without a reason.*num_proc"):
        training()
    assert len(found) >= ROWS
    data.teardown("fit")
    assert not data.rolling.job.root.exists()


def test_what_was_abandoned_goes(tmp_path) -> None:
    old, young, own = (tmp_path / f"rolling-{name}" for name in ("old", "young", "own"))
    for folder in (old, young, own, tmp_path / "x"):
        folder.mkdir()
    for folder in (old, own):
        os.utime(folder, (0, 0))
    remove_abandoned(tmp_path, "rolling-", but=own)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([young.name, own.name, "x"])


def test_places_say_where_readers_are(tmp_path) -> None:
    shelf = Shelf(tmp_path)
    shelf.clear()
    assert shelf.slowest() is None
    shelf.say_reading(0, (0, 3))
    shelf.say_reading(1, None)
    assert shelf.slowest() is None  # not all have begun
    place: Place = (1, 0)
    shelf.say_reading(1, place)
    assert shelf.slowest() == (0, 3)
    shelf.fail("No.")
    assert shelf.failure() == "No."
    shelf.clear()
    assert shelf.failure() is None
    assert shelf.slowest() is None


def test_files_come_in_another_order_each_time() -> None:
    orders = [order_of_files(20, 7, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert order_of_files(20, 8, 0) != orders[0] == order_of_files(20, 7, 0)


def test_several_processes_prepare_files_of_many_chunks(make, tmp_path, capfd) -> None:
    for file in range(3):
        (tmp_path / "data" / f"{file}.jsonl").write_text(lines_of(rows_of(file, 1100)))
    urls = [str(tmp_path / "data" / f"{file}.jsonl") for file in range(3)]
    data = make(train=urls, num_proc=2, files=200)
    loader = data.train_dataloader()
    assert len(list(itertools.islice(loader, 3 * 1100 // BATCH))) == 825
    loader = make(train=urls, num_proc=2, files=200).train_dataloader()
    for url in urls[1:]:  # behind the one that is looked at before
        Path(url).write_text('{"prompt": "broken')
    with pytest.raises(UserError, match=r"Malformed JSON at .*jsonl:1 "):
        next(iter(loader))
    assert "Fatal" not in capfd.readouterr().err


def test_the_processes_end_with_the_one_that_reads(make, tmp_path) -> None:
    script = tmp_path / "script.py"
    (tmp_path / "data" / "0.jsonl").write_text(lines_of(rows_of(0, 1100)))
    data = make(files=200)
    script.write_text(
        "import itertools, os, sys, time\n"
        "from dskd_lightning import InstructionDataModule, StudentSpec, TeacherSpec\n"
        f"source = {data.student.source!r}\n"
        f"data = InstructionDataModule({str(tmp_path / 'data')!r}, student=StudentSpec(source), "
        f"teacher=TeacherSpec(source), max_length=96, max_prompt_length=40, num_proc=2, num_workers=1, "
        f"cache_dir={str(tmp_path / 'cache')!r}, disk_limit_gb={data.disk_limit_gb})\n"
        "loader = data.train_dataloader()\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
        "print(loader._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    session = int(run.stdout.readline())
    os.killpg(session, signal.SIGTERM)  # it isn't for others to end
    time.sleep(0.5)
    assert alive(session)
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 20
    while alive(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(session)


def alive(session: int) -> bool:
    """Whether a process of the session is left."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state != "Z":
                return True
    return False


def test_two_runs_need_folders_of_their_own(threads, make, tmp_path) -> None:
    first, second = make(), make()
    at_rank(first, tmp_path / "run")
    with pytest.raises(UserError, match=r"another run prepares the same data.*--output"):
        at_rank(second, tmp_path / "run")
    at_rank(second, tmp_path / "other")
    assert first.rolling.job.root != second.rolling.job.root
    first.on_exception(RuntimeError())  # after which a notebook trains anew
    at_rank(make(), tmp_path / "run")
    assert make(seed=1).rolling._order != make().rolling._order


def test_the_first_file_that_has_examples_stays(threads, make, tmp_path) -> None:
    for name in ("0", "1"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"prompt": "x"}\n')
    data = make(skip_invalid=True)
    loader = at_rank(data, tmp_path / "run")
    view = data.examples("train")
    assert view[0].place.endswith("2.jsonl:1")
    for _ in itertools.islice(loader, 30):
        assert len(data.examples("train")[3].response or "")
    assert data.examples("train").dataset.folder.is_dir()


def test_a_folder_that_cannot_be_written_is_told(make, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Can't write the data cache"):
        make(cache_dir=str(tmp_path / "file")).train_dataloader()


def test_what_was_waited_only_grows(threads, make) -> None:
    loader = make().train_dataloader()
    waited = []
    for _ in range(6):
        for _ in itertools.islice(loader, 3):
            waited.append(loader.waited)
        waited.append(loader.waited)
    assert waited == sorted(waited)
    assert waited[-1] > 0
