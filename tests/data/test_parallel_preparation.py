"""Preparation by several processes: the same bytes for any number of them, and for any kill in between."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pickle
import pkgutil
import resource
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from dskd_lightning import InstructionDataModule, StudentSpec, TeacherSpec, UserError
from dskd_lightning.cores import usable_cores
from dskd_lightning.data import chunks, preparation, workers
from dskd_lightning.data.examples import Example, InvalidRecord, Message
from dskd_lightning.data.groups import groups_of
from dskd_lightning.data.open_files import allow_open_files
from dskd_lightning.data.partial import PartialDataset
from dskd_lightning.data.reading import RawRecord
from dskd_lightning.data.remote import RemoteFile
from dskd_lightning.data.sources import Source, resolve_sources
from dskd_lightning.data.workers import worked_in_order
from dskd_lightning.runs.lock import only_one

Build = Callable[..., InstructionDataModule]


@pytest.fixture
def build(model_folder, tmp_path: Path, monkeypatch) -> Build:
    """Some sixty chunks of conversations, two documents of several windows among them."""
    monkeypatch.setattr(chunks, "_RECORDS", 3)
    rows = [{"prompt": f"Say {n}.", "response": f"{n} " * (n % 5 + 1)} for n in range(170)]
    names = ["a.jsonl", "texts.jsonl", "b.jsonl"]
    for name, part in zip(
        names, (rows[:91], [{"text": "A text of words. " * 30}] * 2, rows[91:]), strict=True
    ):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))

    def make(cache: str, **options) -> InstructionDataModule:
        return InstructionDataModule(
            options.pop("train", [str(tmp_path / name) for name in names]),
            student=StudentSpec(model_folder()),
            teacher=TeacherSpec(model_folder(tokenizer="sentencepiece")),
            cache_dir=str(tmp_path / cache),
            **{"learn": "everything", "max_length": 64, "max_prompt_length": 32, **options},
        )

    return make


def files(data: InstructionDataModule) -> dict[str, bytes]:
    folder = data._prepared("train").folder
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fork(run: Callable[[], object]) -> int:
    """The process that runs ``run`` and ends."""
    if (child := os.fork()) == 0:
        try:
            run()
        finally:
            os._exit(0)
    return child


def test_bytes_are_the_same_for_any_number_of_processes(build, caplog) -> None:
    alone = files(build("alone", num_proc=1))
    assert {"report.json", "lengths.npy", "examples.arrow", "model-0.arrow", "model-1.arrow"} == alone.keys()
    assert files(build("two", num_proc=2)) == alone
    assert files(build("three", num_proc=3)) == alone
    data = build("three")
    data.setup("fit")
    assert len({data.examples("train")[i].place for i in range(len(data.examples("train")))}) == 172


def test_processes_really_share_the_work(build, tmp_path, monkeypatch) -> None:
    render, deadline = preparation.render_chunk, time.monotonic() + 20

    def told(records, **options):
        (tmp_path / f"worker {os.getpid()}").touch()
        while len(list(tmp_path.glob("worker *"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return render(records, **options)

    monkeypatch.setattr(preparation, "render_chunk", told)
    files(build("two", num_proc=2))
    assert len(list(tmp_path.glob("worker *"))) == 2
    assert not (tmp_path / f"worker {os.getpid()}").exists()


def test_work_can_be_sent_to_a_process_that_shares_nothing(build) -> None:
    data = build("any")
    settings = preparation.PreparationSettings(max_length=64, max_prompt_length=32)
    records = list(preparation.read_records(resolve_sources(data.sources["train"]), settings, Counter()))
    assert all(isinstance(record, RawRecord) for record in records)  # so that others parse them
    work = partial(chunks.render_chunk, renderers=data.renderers, settings=settings)
    sent_work, sent_records = pickle.loads(pickle.dumps((work, records[18:30])))
    assert pickle.loads(pickle.dumps(sent_work(sent_records))) == work(records[18:30])


@pytest.mark.parametrize("limit", [None, 30])
def test_what_is_lost_is_counted_whoever_parses_it(build, tmp_path, limit) -> None:
    rows = [{"prompt": f"Say {n}.", "response": f"{n}", "kept": n, "score": [n]} for n in range(45)]
    rows[7]["response"] = ""
    rows[19] = {"prompt": "no response"}
    texts = [json.dumps(row) for row in rows]
    texts[11], texts[23] = "{", '{"prompt": "a", "response": "b", "deep": ' + "[" * 800 + "]" * 800 + "}"
    (tmp_path / "lossy.jsonl").write_text("\n".join(texts))
    alone, two = (
        files(build(f"{n}", train=str(tmp_path / "lossy.jsonl"), num_proc=n, skip_invalid=True, limit=limit))
        for n in (1, 2)
    )
    assert two == alone
    counts = json.loads(alone["report.json"])["counts"]
    assert counts["used"] == (limit or 42)
    assert counts["read"] == (33 if limit else 45)
    assert sum(number for name, number in counts.items() if name.startswith("skipped: ")) == 3
    assert counts["skipped: no response"] == 2
    assert counts[f"unused field 'deep' of {tmp_path / 'lossy.jsonl'}"] == 1
    rows[0]["ours"] = threading.Lock()  # can't be sent
    if limit is None:
        in_memory = build("memory", train=rows, num_proc=2, skip_invalid=True)
        assert in_memory._prepared("train").report["used"] == 43


def test_records_of_many_characters_make_small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(chunks, "_CHARACTERS", 50)
    values = [{"text": "x" * 30, "more": {"deep": ["y" * 5, b"12345", 7, None]}}] * 5
    raw = [RawRecord(value, "text", "f", line) for line, value in enumerate(values, 1)]
    assert [len(chunk) for chunk in chunks.chunked(raw)] == [2, 2, 1]
    examples = [Example((Message("assistant", "x" * 26),))] * 5
    assert [len(chunk) for chunk in chunks.chunked(examples)] == [2, 2, 1]


def test_the_first_bad_record_is_told_whoever_meets_it(build, tmp_path) -> None:
    message = {"role": "user", "content": "Say it."}, {"role": "assistant", "content": "it"}
    rows = [json.dumps({"messages": message, "id": n}) for n in range(40)]
    rows[20] = json.dumps({"messages": message, "teacher_messages": message[:1]})  # met where it is rendered
    rows[24] = "{"  # met where it is read, which is further ahead
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(rows))
    with pytest.raises(InvalidRecord, match=r"bad\.jsonl:21 has 'teacher_messages'") as error:
        files(build("bad", train=str(bad), num_proc=2))
    assert error.value.reason == "'teacher_messages' under learn: everything"
    rows[20] = rows[19]
    bad.write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"bad\.jsonl:25"):
        files(build("bad", train=str(bad), num_proc=2))
    assert list((tmp_path / "bad").iterdir()) == []
    counted = [files(build(f"bad {n}", train=str(bad), num_proc=n, skip_invalid=True)) for n in (1, 2)]
    assert counted[0] == counted[1]


@pytest.mark.parametrize(("killed_at", "processes"), [(7, 1), (3, 2), (40, 2)])
def test_a_killed_preparation_is_gone_on_with(
    build, tmp_path, monkeypatch, caplog, killed_at, processes
) -> None:
    monkeypatch.setattr("dskd_lightning.data.partial._EVERY", 4)
    whole, append = files(build("whole", num_proc=1)), PartialDataset.append

    def kill(made, chunk) -> None:
        append(made, chunk)
        if made.chunks == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        monkeypatch.setattr(PartialDataset, "append", kill)
        files(build("killed", num_proc=processes))

    _, status = os.waitpid(fork(killed), 0)
    assert os.WIFSIGNALED(status)
    (left,) = (tmp_path / "killed").glob(".preparing-*")
    for path in (*left.iterdir(), left):  # leftovers of other data would go after a day
        os.utime(path, (0, 0))
    appended = []
    monkeypatch.setattr(
        PartialDataset, "append", lambda made, chunk: (appended.append(chunk), append(made, chunk))
    )
    with caplog.at_level(logging.INFO, logger="dskd_lightning"):
        assert files(build("killed", num_proc=processes)) == whole
    kept = killed_at // 4 * 4
    assert len(appended) == 58 - kept
    assert (f"Going on with {3 * kept} records" in caplog.text) == bool(kept)
    assert [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")] == []


def test_what_takes_long_is_noted_by_time(build, monkeypatch) -> None:
    now, noted = [0.0], []
    monkeypatch.setattr("dskd_lightning.data.partial.time", SimpleNamespace(monotonic=lambda: now[0]))
    append, note = PartialDataset.append, PartialDataset._note

    def slowly(made, chunk) -> None:
        now[0] += 4.0
        append(made, chunk)

    monkeypatch.setattr(PartialDataset, "append", slowly)
    monkeypatch.setattr(PartialDataset, "_note", lambda made: (noted.append(made.chunks), note(made)))
    files(build("slow", num_proc=1))
    assert noted[:3] == [3, 6, 9]  # 12 seconds each, long before 64 chunks


@pytest.mark.parametrize("damage", ["journal.json", "lengths.raw", "a count"])
def test_what_a_killed_preparation_left_damaged_is_made_again(build, tmp_path, monkeypatch, damage) -> None:
    monkeypatch.setattr("dskd_lightning.data.partial._EVERY", 4)
    whole, append = files(build("whole", num_proc=1)), PartialDataset.append

    def stop(made, chunk) -> None:
        append(made, chunk)
        if made.chunks == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialDataset, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            files(build("stopped", num_proc=2))
    (folder,) = (tmp_path / "stopped").glob(".preparing-*")
    if damage == "a count":
        state = json.loads((folder / "journal.json").read_text())
        state["counts"] = {name: count + 1 for name, count in state["counts"].items()} | {"records": 1}
        (folder / "journal.json").write_text(json.dumps(state))
    else:
        path = folder / damage
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert files(build("stopped", num_proc=1)) == whole


def runs(pid: int) -> bool:
    """Also where nobody takes note of the end of processes without a parent, as in some containers."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_end_with_the_one_that_was_killed(build, tmp_path, monkeypatch) -> None:
    render = preparation.render_chunk

    def told(records, **options):
        (tmp_path / f"worker {os.getpid()}").touch()
        time.sleep(0.05)
        return render(records, **options)

    monkeypatch.setattr(preparation, "render_chunk", told)
    child = fork(lambda: files(build("killed", num_proc=2)))
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("worker *"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    others = [int(path.name.split()[1]) for path in tmp_path.glob("worker *")]
    while any(map(runs, others)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in others if runs(pid)]


def test_a_process_that_the_system_ends_is_one_sentence(build, monkeypatch, caplog) -> None:
    whole, render, own = files(build("whole", num_proc=1)), preparation.render_chunk, os.getpid()

    def dies(records, **options):
        if os.getpid() != own and any(record.value.get("prompt") == "Say 119." for record in records):
            os.kill(os.getpid(), signal.SIGKILL)
        return render(records, **options)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "render_chunk", dies)
        patch.setattr("dskd_lightning.data.partial._EVERY", 4)
        with pytest.raises(UserError, match=r"data\.num_proc: one of the 2 processes .* was ended"):
            files(build("died", num_proc=2))
    with caplog.at_level(logging.INFO, logger="dskd_lightning"):
        assert files(build("died", num_proc=2)) == whole
    assert "that an earlier process has prepared" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux alone chooses by it")
def test_the_kernel_ends_a_process_that_works_before_the_one_that_can_tell() -> None:
    own = _ended_first(0)
    assert list(worked_in_order(_ended_first, range(3), 2)) == [1000] * 3
    assert _ended_first(0) == own


def _ended_first(_: int) -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())


NO_MEMORY, NO_PROCESS = OSError(errno.ENOMEM, "no memory"), OSError(errno.EAGAIN, "no process")
NO_THREAD = RuntimeError("can't start new thread")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("refused", "error"),
    [
        ("multiprocessing.popen_fork.Popen._launch", NO_MEMORY),
        ("multiprocessing.popen_fork.Popen._launch", NO_PROCESS),
        ("multiprocessing.queues.Queue.__init__", NO_MEMORY),
        ("concurrent.futures.process._ExecutorManagerThread.start", NO_THREAD),
        ("multiprocessing.queues.Queue._start_thread", NO_THREAD),  # in the pool's thread, which ends of it
        ("dskd_lightning.data.preparation.render_chunk", NO_MEMORY),
        ("dskd_lightning.data.preparation.render_chunk", MemoryError()),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_processes_that_the_system_refuses_are_one_sentence(build, monkeypatch, refused, error) -> None:
    module, name = refused.rsplit(".", 1)
    owner = pkgutil.resolve_name(module)
    made, calls, own = getattr(owner, name), [], os.getpid()

    def refuse(*args, **kwargs):
        calls.append(args)
        if len(calls) > (name == "_launch") and (name != "render_chunk" or os.getpid() != own):
            raise error
        return made(*args, **kwargs)

    before = set(multiprocessing.active_children())
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        with pytest.raises(UserError, match=r"data\.num_proc: one of the 3 processes .* was refused") as told:
            files(build("refused", num_proc=3))
    assert str(told.value).endswith("set a smaller number; what is finished is kept.")
    assert set(multiprocessing.active_children()) == before  # or this process would wait for them at its end
    assert files(build("refused", num_proc=1)) == files(build("whole", num_proc=1))


def test_other_errors_of_reading_and_rendering_stay_what_they_are() -> None:
    with pytest.raises(OSError, match="quite another"):
        list(worked_in_order(_fail, range(3), 2))


def _fail(_: int) -> None:
    raise OSError(errno.ENOSPC, "quite another")


def test_one_prepares_and_the_others_wait(build, tmp_path, monkeypatch, caplog) -> None:
    """Whose turn comes when the first is done finds its work; where that was killed, it goes on with it."""
    lock, entered = tmp_path / "lock", []

    def enter() -> None:
        with only_one(lock, "counts") as alone:
            entered.append(alone and lock.exists())  # or those that come now would lock another file

    with caplog.at_level(logging.INFO, logger="dskd_lightning"), only_one(lock, "counts") as alone:
        assert alone
        threads = [threading.Thread(target=enter) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while (
            caplog.text.count("Waiting for another process that counts") < 2 and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        assert entered == []
    for thread in threads:
        thread.join(60)
    assert entered == [True, True]
    assert not lock.exists()


@pytest.fixture
def many(build, tmp_path, monkeypatch) -> Callable[..., InstructionDataModule]:
    """Eight files, each prepared by itself."""
    monkeypatch.setattr("dskd_lightning.data.groups._BYTES", 0)
    for number in range(8):
        rows = [{"prompt": f"Say {n}.", "response": f"{number} {n}"} for n in range(10)]
        path = tmp_path / f"many {number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [str(tmp_path / f"many {number}.jsonl") for number in range(8)]
    return partial(build, train=names, num_proc=1)


def rows_of(data: InstructionDataModule) -> list[tuple[str, list[int]]]:
    dataset = data._prepared("train")
    return [(dataset.example(i).place, dataset.rendered(i).input_ids.tolist()) for i in range(len(dataset))]


def test_machines_that_share_a_folder_share_the_files(many, tmp_path, monkeypatch, caplog) -> None:
    write, whole = preparation._write, rows_of(many("alone"))
    assert len(whole) == 80
    deadline = time.monotonic() + 20

    def lines_of(path: Path) -> int:
        return len(path.read_text().splitlines())

    def all_made(count: int) -> bool:
        return sum(lines_of(path) >= count for path in tmp_path.glob("made by *")) == 3

    def told(making, names, *rest) -> None:
        with (tmp_path / f"made by {os.getpid()}").open("a") as file:
            file.write(f"{names}\n")
        inside = tmp_path / f"inside {os.getpid()}"
        inside.touch()
        mine = lines_of(tmp_path / f"made by {os.getpid()}")
        while mine <= 2 and not all_made(mine) and time.monotonic() < deadline:
            time.sleep(0.01)
        if len(list(tmp_path.glob("inside *"))) > 1:
            (tmp_path / "together").touch()
        write(making, names, *rest)
        inside.unlink()

    monkeypatch.setattr(preparation, "_write", told)
    others = [fork(lambda: many("shared")._prepared("train")) for _ in range(2)]
    with caplog.at_level(logging.INFO, logger="dskd_lightning"):
        assert rows_of(many("shared")) == whole
    for other in others:
        assert os.waitpid(other, 0)[1] == 0
    made = {path.name: path.read_text().splitlines() for path in tmp_path.glob("made by *")}
    assert (tmp_path / "together").exists()
    assert len(made) == 3
    assert min(map(len, made.values())) >= 2
    names = [name for found in made.values() for name in found]
    assert len(names) == len(set(names)) == 8  # none twice


def test_what_a_killed_machine_was_at_is_made_by_another(many, monkeypatch, tmp_path) -> None:
    write, whole = preparation._write, rows_of(many("alone"))

    def killed(making, names, *rest) -> None:
        if "many 2" in names:
            (tmp_path / "there").touch()
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        write(making, names, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_write", killed)
        other = fork(lambda: many("shared")._prepared("train"))
        deadline = time.monotonic() + 60
        while not (tmp_path / "there").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert rows_of(many("shared")) == whole
    assert os.WIFSIGNALED(os.waitpid(other, 0)[1])


def test_nobody_waits_while_there_is_something_else_to_do() -> None:
    asked: list[tuple[int, bool]] = []
    free = {0: 3, 1: 1, 2: 1}  # the attempt that finds it, or is waited for

    def attempt(at: int, wait: bool) -> str | None:
        asked.append((at, wait))
        free[at] -= 1
        return f"{at}" if wait or not free[at] else None

    assert list(preparation._in_turn(3, attempt)) == [(1, "1"), (2, "2"), (0, "0")]
    assert asked == [(0, False), (1, False), (2, False), (0, False), (0, True)]


def test_groups_follow_from_sizes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dskd_lightning.data.groups._BYTES", 100)
    for number, size in enumerate([40, 40, 40, 300, 10, 90, 1]):
        (tmp_path / f"{number}.jsonl").write_text(" " * size)
    sources = resolve_sources(str(tmp_path))
    sources.insert(5, Source("elsewhere", RemoteFile("https://example.org/a.jsonl")))
    found = [[source.name[-7:-6] for source in group] for group in groups_of(sources)]
    assert found == [["0", "1"], ["2"], ["3"], ["4"], ["s"], ["5", "6"]]
    assert [len(group) for group in groups_of(sources, limit=7)] == [8]


def test_more_files_are_mapped_than_a_process_may_open_by_default(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dskd_lightning.data.open_files._counts", weakref.WeakKeyDictionary())

    def within(soft: int, hard: int) -> int:
        def run() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            try:
                first, second = threading.Event(), threading.Event()  # each maps a part
                allow_open_files(first, 150)
                allow_open_files(second, 150)
                files = [(tmp_path / "file").open("w") for _ in range(300)]
            except UserError as error:
                (tmp_path / "said").write_text(str(error))
                os._exit(3)
            os._exit(len(files) == 300)

        return os.waitstatus_to_exitcode(os.waitpid(fork(run), 0)[1])

    assert within(256, 2048) == 1
    assert within(256, 700) == 3
    assert "300 files of prepared data must be open at once" in (tmp_path / "said").read_text()
    asked = []
    monkeypatch.setattr(
        "dskd_lightning.data.prepared.allow_open_files", lambda owner, count: asked.append(count)
    )
    data = InstructionDataModule("demo", student=StudentSpec("demo"), cache_dir=str(tmp_path / "c"), limit=4)
    data._prepared("train")
    assert asked == [2]


def test_results_come_in_order_and_no_further_ahead_than_needed() -> None:
    taken = []

    def source():
        for number in range(40):
            taken.append(number)
            yield number

    found = []
    for square in worked_in_order(_square, source(), 2):
        found.append(square)
        assert len(taken) <= len(found) + workers._AHEAD * 2 + 1
    assert found == [n * n for n in range(40)]
    assert list(worked_in_order(lambda n: n + os.getpid(), [5], 2)) == [
        5 + os.getpid()
    ]  # not worth a process
    assert usable_cores() >= 1
    with pytest.raises(UserError, match="`num_proc: 0` must be at least 1"):
        InstructionDataModule("demo", num_proc=0)


def _square(number: int) -> int:
    return number * number
