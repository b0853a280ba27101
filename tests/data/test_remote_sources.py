"""Data behind URLs: the same records as of local files, whatever the server does, none on the disk."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_server import FileServer, serving, small_pieces
from fsspec.implementations.memory import MemoryFileSystem

from dskd_lightning import InstructionDataModule, StudentSpec, UserError
from dskd_lightning.data import chunks, preparation, remote, remote_faults, remote_stream
from dskd_lightning.data.partial import PartialDataset
from dskd_lightning.data.remote_faults import SourceChanged, SourceUnavailable
from dskd_lightning.data.sources import resolve_sources

ROWS = [{"prompt": f"Say {n}, é.", "response": f"{n} " * (n % 5) + "."} for n in range(170)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=40)
    return sink.getvalue()


FILES = {
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "b.json": json.dumps({"data": ROWS}).encode(),
    "a.csv": table(ROWS),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.csv.zst": pa.compress(table(ROWS), "zstd", asbytes=True),
    "a.parquet": parquet(ROWS),
}


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, most=1024)
    monkeypatch.setattr(remote, "_PIECE", 128)
    monkeypatch.setattr(remote_faults, "_SECONDS", 1.0)
    monkeypatch.setattr(chunks, "_RECORDS", 3)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(FileServer()) as made:
        yield made


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = MemoryFileSystem()
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def build(model_folder, tmp_path: Path) -> Callable[..., InstructionDataModule]:
    def make(cache: str, train: Any, **options: Any) -> InstructionDataModule:
        options = {"num_proc": 1, "max_length": 64, "max_prompt_length": 32, **options}
        return InstructionDataModule(
            train, student=StudentSpec(model_folder()), cache_dir=str(tmp_path / cache), **options
        )

    return make


def values(url: str) -> list[Any]:
    return [record.value for source in resolve_sources(url) for record in source.records()]


def tokens(data: InstructionDataModule) -> tuple[list[list[int]], list[str]]:
    """What the student reads of each example, and its answer."""
    dataset = data._prepared("train")
    examples = [dataset.example(row) for row in range(len(dataset))]
    return (
        [dataset.rendered(row).input_ids.tolist() for row in range(len(dataset))],
        [example.response or "" for example in examples],
    )


def in_thirds(server: FileServer) -> list[str]:
    """Three files, and their URLs."""
    lines = LINES.splitlines(True)
    for number in range(3):
        server.files[f"/{number}.jsonl"] = b"".join(lines[60 * number : 60 * number + 60])
    return [f"{server.url}/{number}.jsonl" for number in range(3)]


def folders(cache: Path) -> tuple[list[str], list[str]]:
    """Names of what is finished, and of what isn't."""
    names = [path.name for path in cache.iterdir() if path.is_dir()]
    return [n for n in names if not n.startswith(".")], [n for n in names if n.startswith(".preparing-")]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("protocol", ["http", "memory", "file"])
def test_every_kind_of_file(server, memory, tmp_path: Path, name: str, protocol: str) -> None:
    local = tmp_path / name
    local.write_bytes(FILES[name])
    server.files[f"/{name}"] = FILES[name]
    memory.pipe(f"/data/{name}", FILES[name])
    url = {"http": f"{server.url}/{name}", "memory": f"memory://data/{name}", "file": f"file://{local}"}[
        protocol
    ]
    (here,), (there,) = resolve_sources(str(local)), resolve_sources(url)
    assert there.name == url
    expected = [(record.value, record.line) for record in here.records()]
    assert [value for value, _ in expected] == ROWS
    assert [(record.value, record.line) for record in there.records()] == expected
    there.check_unchanged()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.csv.zst"])
def test_a_server_that_fails_and_recovers(server, name: str, ranges: bool, caplog) -> None:
    server.files[f"/{name}"], server.ranges = FILES[name], ranges
    url = f"{server.url}/{name}"
    server.faults = ["cut", "", "cut", 503, "", "drop", "", "", "stall", 429, "cut"]
    if not ranges:  # few requests, and half of the file is enough for the first ones
        server.faults = [503, "drop", 429, "cut", "cut", "stall", "cut", "stall", "cut"]
    assert values(url) == ROWS
    assert not server.faults
    for told in ("HTTP 503 Service Unavailable", "no answer within 1 s", "Too Many Requests"):
        assert told in caplog.text


def test_reading_goes_on_at_the_byte_where_it_broke_off(server) -> None:
    server.files["/a.jsonl"] = LINES
    server.faults = ["", ""] + ["", "cut"] * 8
    assert values(f"{server.url}/a.jsonl") == ROWS
    places = [place for _, place in server.asked[2:]]
    assert places == sorted(places)
    assert server.sent < 1.5 * len(LINES)
    server.asked.clear()
    server.ranges, server.faults = False, ["", "", "", "cut", "cut"]
    assert values(f"{server.url}/a.jsonl") == ROWS
    assert len(server.asked) < 10  # one connection each, not one a piece


def test_a_response_shorter_than_the_file_is_no_end(memory, monkeypatch) -> None:
    """As of servers that end the connection without having said how much would come."""
    memory.pipe("/a.jsonl", LINES)
    cut = [100, 700, 3000]

    def shorter(system: MemoryFileSystem, path: str, *args: Any, **options: Any) -> io.BytesIO:
        return io.BytesIO(LINES[: cut.pop()] if cut else LINES)

    monkeypatch.setattr(MemoryFileSystem, "_open", shorter)
    assert values("memory://a.jsonl") == ROWS
    assert not cut


def test_parquet_needs_a_server_that_begins_anywhere(server) -> None:
    server.files["/a.parquet"], server.ranges = FILES["a.parquet"], False
    with pytest.raises(UserError, match=r"a\.parquet' can't begin to read in the middle .* give JSON Lines"):
        values(f"{server.url}/a.parquet")
    server.ranges, server.faults = True, ["", "cut", 500, "", "stall"]
    assert values(f"{server.url}/a.parquet") == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bytes_come_as_they_lie_there(server, name: str) -> None:
    server.files[f"/{name}"], server.packs = FILES[name], True
    server.faults = ["", "cut", "", "cut"]
    assert values(f"{server.url}/{name}") == ROWS


@pytest.mark.parametrize("head", [True, False])
def test_prepared_bytes_are_those_of_the_local_file(server, build, tmp_path: Path, head: bool) -> None:
    server.files["/a.jsonl"], server.head = LINES, head
    (tmp_path / "a.jsonl").write_bytes(LINES)
    server.faults = ["", "cut", 503, "", "", "drop"]
    here = build("here", str(tmp_path / "a.jsonl"))._prepared("train")
    there = build("there", f"{server.url}/a.jsonl", num_proc=2)._prepared("train")
    for name in ("model-0.arrow", "lengths.npy"):
        assert (there.folder / name).read_bytes() == (here.folder / name).read_bytes()
    assert there.report == here.report
    assert there.report["used"] == 170
    first, last = there.example(0), there.example(169)
    assert (first.place, last.place) == (f"{server.url}/a.jsonl:1", f"{server.url}/a.jsonl:170")


def test_nothing_of_the_raw_data_lies_on_the_disk(server, build, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tmp").mkdir()
    for name in ("TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "DSKD_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    server.files["/a.jsonl"] = LINES
    server.files["/b.jsonl.gz"] = gzip.compress(LINES, 0)  # what is in it stands there as it is
    found: list[Path] = []
    looked = []

    def look(_: str) -> None:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        looked.extend(files)
        found.extend(path for path in files if b'{"prompt"' in path.read_bytes())

    server.before = look
    build("cache", [f"{server.url}/a.jsonl", f"{server.url}/b.jsonl.gz"])._prepared("train")
    look("")
    assert looked
    assert not found
    pieces = [
        later - place for (_, place), (_, later) in zip(server.asked[3:], server.asked[4:], strict=False)
    ]
    assert max(pieces) == remote_stream._MOST


def test_a_server_that_is_gone_keeps_what_is_finished(server, build, tmp_path: Path, caplog) -> None:
    urls = in_thirds(server)
    whole = tokens(build("whole", urls))
    server.always["/1.jsonl"] = (sum(path == "/1.jsonl" for path, _ in server.asked) + 5, 503)
    with pytest.raises(SourceUnavailable) as caught:
        build("cache", urls)._prepared("train")
    assert str(caught.value) == (
        f"Can't read '{urls[1]}' after 8 attempts (HTTP 503 Service Unavailable): look at the network and "
        "the server, and start again, which goes on with what is finished."
    )
    finished, begun = folders(tmp_path / "cache")
    assert (len(finished), len(begun)) == (1, 1)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / finished[0]).iterdir()}
    server.always.clear()
    server.asked.clear()
    appended = []
    append = PartialDataset.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialDataset, "append", lambda made, chunk: (appended.append(1), append(made, chunk)))
        assert tokens(build("cache", urls)) == whole
    assert 17 < len(appended) < 20 + 17  # of the second file what was missing
    assert "/0.jsonl" not in {path for path, _ in server.asked}
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert [len(part) for part in folders(tmp_path / "cache")] == [3, 0]


def test_a_file_that_is_not_there_is_told_before_others_are_read(server, build) -> None:
    urls = in_thirds(server)
    with pytest.raises(UserError, match=r"none\.jsonl' doesn't exist"):
        build("cache", [*urls, f"{server.url}/none.jsonl"])._prepared("train")
    assert server.asked == []


def test_a_killed_preparation_is_gone_on_with(server, build, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dskd_lightning.data.partial._EVERY", 4)
    urls = in_thirds(server)
    whole = tokens(build("whole", urls))
    append = PartialDataset.append

    def kill(made: PartialDataset, chunk: Any) -> None:
        append(made, chunk)
        if made.chunks == 9 and len(folders(tmp_path / "killed")[0]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    data = build("killed", urls)
    if (child := os.fork()) == 0:
        try:
            PartialDataset.append = kill  # type: ignore[method-assign]
            data._prepared("train")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert [len(part) for part in folders(tmp_path / "killed")] == [1, 1]
    server.asked.clear()
    appended = []
    monkeypatch.setattr(
        PartialDataset, "append", lambda made, chunk: (appended.append(1), append(made, chunk))
    )
    assert tokens(build("killed", urls)) == whole
    assert len(appended) == (20 - 8) + 17  # 60 and 50 examples, three in a chunk
    assert "/0.jsonl" not in {path for path, _ in server.asked}


@pytest.mark.parametrize("versions", ["ETag", "Last-Modified", ""])
def test_a_file_that_changes_while_it_is_read(server, build, tmp_path: Path, versions: str) -> None:
    server.versions = versions
    urls = in_thirds(server)
    other = server.files["/1.jsonl"].replace(b"Say", b"Sag")
    reads = []

    def change(path: str) -> None:
        reads.append(path)
        if path == "/1.jsonl" and reads.count(path) == (11 if versions == "" else 4):
            server.files[path] = other

    server.before = change
    with pytest.raises(SourceChanged, match=r"1\.jsonl' has changed while it was read: start again"):
        build("cache", urls)._prepared("train")
    assert [len(part) for part in folders(tmp_path / "cache")] == [1, 0]
    server.before = lambda path: None
    (tmp_path / "local.jsonl").write_bytes(b"".join(server.files[f"/{n}.jsonl"] for n in range(3)))
    assert tokens(build("cache", urls)) == tokens(build("local", str(tmp_path / "local.jsonl")))


def test_a_change_that_makes_a_line_malformed_is_told_as_a_change(server, build) -> None:
    server.files["/a.jsonl"] = LINES

    def change(path: str) -> None:
        if len(server.asked) == 9:
            server.files[path] = b"x" * len(LINES)

    server.before = change
    with pytest.raises(SourceChanged):
        build("cache", f"{server.url}/a.jsonl")._prepared("train")


def test_a_malformed_line_is_told_with_url_and_line(server, build, tmp_path: Path) -> None:
    server.files["/a.jsonl"] = LINES[:900] + b"\n" + LINES[900:]
    with pytest.raises(UserError, match=rf"Malformed JSON at {server.url}/a\.jsonl:\d+ "):
        build("cache", f"{server.url}/a.jsonl")._prepared("train")
    assert folders(tmp_path / "cache") == ([], [])


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "credentials for '{url}' are missing or refused (HTTP 401 Unauthorized): sign the URL anew"),
        (403, "credentials for '{url}' are missing or refused (HTTP 403 Forbidden): sign the URL anew"),
        (404, "The data file '{url}' doesn't exist: correct the URL."),
        (400, "Can't read '{url}' (HTTP 400 Bad Request): correct the URL."),
    ],
)
def test_a_refusal_is_one_sentence_at_once_without_secrets(server, status: int, told: str, caplog) -> None:
    server.statuses["/a.jsonl"] = status
    url = f"{server.url.replace('//', '//me:pass@')}/a.jsonl?X-Amz-Signature=secret&sig=secret"
    (source,) = resolve_sources(url)
    with pytest.raises(UserError) as caught:
        source.fingerprint()
    shown = f"{server.url.replace('//', '//***@')}/a.jsonl?***"
    assert told.format(url=shown) in str(caught.value)
    assert source.name == shown
    for text in (str(caught.value), caplog.text, repr(source)):
        assert "secret" not in text
        assert "me:" not in text
    assert len(server.queries) == 2  # HEAD, and GET for servers that don't answer it


def test_a_host_that_is_not_there_is_one_sentence(caplog) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.jsonl"
        with pytest.raises(SourceUnavailable, match=rf"Can't read '{url}' after 8 attempts"):
            resolve_sources(url)[0].fingerprint()
    assert caplog.text.count("trying again") == 7


def test_the_wait_grows_and_is_what_the_server_asks_for(monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote_faults, "_BACKOFF", 1.0)
    monkeypatch.setattr(remote_faults.time, "sleep", waits.append)

    busy = ConnectionError("busy")
    busy.headers = {"Retry-After": "7"}  # type: ignore[attr-defined]
    patience = remote_faults.Patience("s3://a/b", "b")
    patience.failed(busy)
    patience.progressed()
    for _ in range(7):
        patience.failed(ConnectionError("lost"))
    assert waits == [7, 1, 2, 4, 8, 16, 32, 60]
    with pytest.raises(SourceUnavailable, match=r"'b' after 8 attempts \(lost\)"):
        patience.failed(ConnectionError("lost"))


def test_errors_of_other_file_systems() -> None:
    class NoCredentialsError(Exception):
        """As botocore's."""

    class ClientError(Exception):
        """Likewise."""

        def __init__(self, status: int) -> None:
            super().__init__(f"An error occurred ({status})")
            self.response = {"Error": {}, "ResponseMetadata": {"HTTPStatusCode": status}}

    for error, told in {
        ClientError(404): "The data file 's3://b/c.jsonl' doesn't exist",
        ClientError(403): "missing or refused (HTTP 403)",
        NoCredentialsError("Unable to locate credentials"): "set AWS_PROFILE, or AWS_ACCESS_KEY_ID",
        PermissionError("Forbidden"): "missing or refused (PermissionError: Forbidden)",
        FileNotFoundError("b/c.jsonl"): "doesn't exist",
        KeyError("Body"): "Can't read 's3://b/c.jsonl' (KeyError: 'Body')",
        IsADirectoryError("b"): "IsADirectoryError",
    }.items():
        assert told in str(remote_faults.final_fault(error, "s3://b/c.jsonl", "s3://b/c.jsonl"))
    slow = OSError("Please reduce your request rate")
    for passing in (ConnectionResetError(), TimeoutError(), slow, ClientError(503)):
        assert remote_faults.final_fault(passing, "s3://b/c", "s3://b/c") is None
    wrapped = FileNotFoundError("u")
    wrapped.__cause__ = TimeoutError("no answer within 60 s")  # what fsspec makes of it over HTTP
    assert remote_faults.final_fault(wrapped, "https://b/c", "https://b/c") is None
    assert remote_faults.said(wrapped) == "no answer within 60 s"


@pytest.mark.parametrize(
    ("url", "package", "told"),
    [
        ("s3://bucket/a.jsonl", "s3fs", "needs the package s3fs: pip install 'dskd-lightning\\[s3\\]'"),
        ("gs://bucket/*.jsonl", "gcsfs", "needs the package gcsfs: pip install 'dskd-lightning\\[gcs\\]'"),
        ("abfs://bucket/a.jsonl", "adlfs", r"needs another package \(.*adlfs"),
        ("nonsense://a.jsonl", "", "Can't read 'nonsense://a.jsonl' .*Protocol not known: nonsense"),
    ],
)
def test_a_missing_package_is_one_sentence(url: str, package: str, told: str, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package or "nonsense", None)
    with pytest.raises(UserError, match=told):
        resolve_sources(url)[0].fingerprint()


def test_folders_and_patterns(memory, server, tmp_path: Path) -> None:
    names = ["a.jsonl", "a.meta.json", "sub/b.csv", ".hidden.jsonl", ".git/c.jsonl", "readme.md"]
    for name in names:
        memory.pipe(f"/set/{name}", b"{}")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    for url in ("memory://set", "memory://set/", f"file://{tmp_path}"):
        found = [
            source.name.rpartition("set/")[2].removeprefix(f"file://{tmp_path}/")
            for source in resolve_sources(url)
        ]
        assert found == ["a.jsonl", "sub/b.csv"]
    assert [source.name for source in resolve_sources("memory://set/*.jsonl")] == ["memory:///set/a.jsonl"]
    assert [source.name for source in resolve_sources("memory://set/**/[ab].*")] == [
        "memory:///set/a.jsonl",
        "memory:///set/sub/b.csv",
    ]
    assert values("memory://set/a.jsonl") == [{}]
    for url in ("memory://none", "memory://set/*.parquet"):
        with pytest.raises(UserError, match=f"'{url.replace('*', '[*]')}' names no data file"):
            resolve_sources(url)
    server.files |= {"/set/": b'<a href="b.jsonl">b</a> <a href="a.csv">a</a> <a href="x.md">x</a>'}
    assert [source.name for source in resolve_sources(f"{server.url}/set/")] == [
        f"{server.url}/set/a.csv",
        f"{server.url}/set/b.jsonl",
    ]


def test_a_url_without_its_secret_comes_from_the_environment(server, monkeypatch) -> None:
    server.files["/a.jsonl"] = LINES
    monkeypatch.setenv("SIGNATURE", "abc&more=1")
    assert values(f"{server.url}/a.jsonl?sig=${{SIGNATURE}}") == ROWS
    assert set(server.queries) == {"sig=abc&more=1"}
    with pytest.raises(UserError, match="names the environment variable NO_SUCH_NAME, which isn't set"):
        resolve_sources("https://example.org/a.jsonl?sig=${NO_SUCH_NAME}")


def test_the_fingerprint_is_of_the_version_not_of_the_signature(server) -> None:
    server.files |= {"/a.jsonl": LINES, "/b.jsonl": LINES}

    def fingerprint(rest: str) -> str:
        return resolve_sources(server.url + rest)[0].fingerprint()

    first = fingerprint("/a.jsonl?id=1&X-Amz-Signature=a&X-Amz-Date=1")
    assert fingerprint("/a.jsonl?X-Amz-Date=2&X-Amz-Signature=b&id=1") == first
    assert fingerprint("/a.jsonl?id=2&X-Amz-Signature=a") != first
    assert fingerprint("/b.jsonl?id=1&X-Amz-Signature=a") != first
    server.files["/a.jsonl"] = LINES[:-1] + b" "
    assert fingerprint("/a.jsonl?id=1&X-Amz-Signature=a") != first


def test_a_limit_is_on_all_files_together(server, build) -> None:
    urls = in_thirds(server)
    assert tokens(build("cache", urls, limit=70))[1] == [row["response"] for row in ROWS[:70]]
    assert "/2.jsonl" not in {path for path, _ in server.asked}


def test_local_files_beside_others_keep_their_place(server, build, tmp_path: Path) -> None:
    urls = in_thirds(server)
    (tmp_path / "1.jsonl").write_bytes(server.files["/1.jsonl"])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    server.files["/empty.jsonl"] = b""
    mixed = [
        urls[0],
        str(tmp_path / "1.jsonl"),
        str(tmp_path / "empty.jsonl"),
        f"{server.url}/empty.jsonl",
        urls[2],
    ]
    assert tokens(build("mixed", mixed)) == tokens(build("urls", urls))
    assert (
        build("mixed", mixed)._prepared("train").fingerprint
        != build("urls", urls)._prepared("train").fingerprint
    )
    with pytest.raises(UserError, match=r"No example is left of .*empty\.jsonl"):
        build("empty", [f"{server.url}/empty.jsonl", str(tmp_path / "empty.jsonl")])._prepared("train")


def test_training_data_in_parts_are_one_dataset(server, build) -> None:
    urls = in_thirds(server)
    (server.files["/all.jsonl"],) = [LINES]
    parts, whole = build("parts", urls), build("whole", f"{server.url}/all.jsonl")
    for data in (parts, whole):
        data.setup("fit")
    first, second = (data.examples("train").dataset for data in (parts, whole))
    assert np.array_equal(first.lengths, second.lengths)
    assert np.array_equal(first.response_tokens(), second.response_tokens())
    assert first.sources()[0] == urls
    assert np.bincount(first.sources()[1]).tolist() == [60, 60, 50]
    batches = [
        [batch.student.input_ids.tolist() for batch in data.train_dataloader()] for data in (parts, whole)
    ]
    assert batches[0] == batches[1]
    weighted = build("parts", urls, weights={urls[0]: 0, urls[2]: 2})
    weighted.setup("fit")
    rows = np.sort(weighted.first_epoch())
    assert np.array_equal(rows, np.sort([*range(60, 120), *range(120, 170), *range(120, 170)]))


def test_a_full_disk_keeps_what_is_finished(server, build, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dskd_lightning.data.partial._EVERY", 4)
    urls = in_thirds(server)
    whole, replacing = tokens(build("whole", urls)), __import__("dskd_lightning.files").files.replacing
    notes = []

    def full(path: Path) -> Any:
        notes.append(path)
        if len(notes) > 7:  # five of the first file
            raise OSError(28, "No space left on device")
        return replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr("dskd_lightning.data.partial.replacing", full)
        with pytest.raises(
            UserError, match=r"Can't write .*cache' \(No space left on device\): free space .* is kept"
        ):
            build("cache", urls)._prepared("train")
    assert [len(part) for part in folders(tmp_path / "cache")] == [1, 1]
    appended = []
    append = PartialDataset.append
    monkeypatch.setattr(
        PartialDataset, "append", lambda made, chunk: (appended.append(1), append(made, chunk))
    )
    assert tokens(build("cache", urls)) == whole
    assert len(appended) == (20 - 8) + 17


@pytest.mark.parametrize(("parts", "more", "times"), [(2, 1, 0), (2, -1, 1), (1, -1, 1)])
def test_a_disk_that_will_be_full_is_told_before_it_is(
    server, build, tmp_path: Path, monkeypatch, caplog, parts: int, more: int, times: int
) -> None:
    """Once, with room for as many parts as the first and some bytes."""
    urls = in_thirds(server)
    for url in urls[1:]:  # each takes the room that the first does
        server.files[url.removeprefix(server.url)] = server.files["/0.jsonl"]
    data = build("cache", urls)
    first = build("first", urls[:1])._prepared("train").folder
    size = sum(path.stat().st_size for path in first.iterdir())
    free = parts * size + more
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    data._prepared("train")
    told = f"GiB in '{tmp_path / 'cache'}', where "
    assert caplog.text.count(told) == times


def test_proxies_are_not_asked_for_this_machine(server, monkeypatch) -> None:
    server.files["/a.jsonl"] = LINES
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert values(f"{server.url}/a.jsonl") == ROWS
    from dskd_lightning.data.file_systems import _options

    trusted = {
        host: _options(f"https://{host}/a")["client_kwargs"]["trust_env"] for host in ("example.org", "[::1]")
    }
    assert trusted == {"example.org": True, "[::1]": False}


def test_weights_that_name_no_entry_hide_secrets(server, build) -> None:
    (url, *_) = in_thirds(server)
    data = build("cache", f"{url}?sig=secret", weights={f"{url}?sig=other": 2})
    data.setup("fit")
    with pytest.raises(UserError, match=r"0\.jsonl\?\*\*\*', which isn't in") as caught:
        data.train_dataloader()
    assert "secret" not in str(caught.value)
    assert "other" not in str(caught.value)


def test_preparation_names_few_of_many_files(server, build, monkeypatch) -> None:
    monkeypatch.setattr(preparation, "_NAMED", 2)
    urls = in_thirds(server)
    for url in urls:
        server.files[url.removeprefix(server.url)] = b""
    with pytest.raises(UserError, match=rf"left of {urls[0]}, {urls[1]} and 1 more \("):
        build("cache", urls)._prepared("train")


def test_the_page_tells_the_limits() -> None:
    """Read where nothing has made them smaller for tests."""
    source = Path(remote_stream.__file__).read_text() + Path(remote_faults.__file__).read_text()
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for code, text in {
        "8 << 20": "pieces of at most 8 MiB",
        "_SECONDS = 60.0": "after 60 seconds",
        "_ATTEMPTS = 8": "After 8 failures",
        "_BACKOFF = 1.0": "double from one second",
    }.items():
        assert code in source
        assert text in page
