"""The bytes of a file elsewhere, of file objects that fail as they are told."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import pytest
from file_server import small_pieces

from dskd_lightning.data.remote_faults import Patience, SourceUnavailable
from dskd_lightning.data.remote_stream import RemoteStream

CONTENT = random.Random(0).randbytes(5000)


class Breaking(io.BytesIO):
    """A file that fails where it is read from ``end`` on; what comes before arrives whole."""

    def __init__(self, end: int, seekable: bool) -> None:
        super().__init__(CONTENT)
        self._end, self._seekable = end, seekable

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self._end:
            raise ConnectionError("lost")
        return super().read(min(size or 0, self._end - self.tell()))

    def seek(self, offset: int, whence: int = 0) -> int:
        if not self._seekable:
            raise ValueError("Cannot seek streaming HTTP file")
        return super().seek(offset, whence)


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, most=512)


def stream(open: Callable[[bool], io.BytesIO], ranges: bool, size: int | None = len(CONTENT)) -> RemoteStream:
    return RemoteStream(open, size, Patience("s3://a", "a"), lambda: None, ranges)


def copy(file: RemoteStream, to: bytearray) -> None:
    while piece := file.read(100):
        to += piece


@pytest.mark.parametrize("ranges", [True, False])
def test_a_place_that_no_attempt_gets_past_is_given_up(ranges: bool) -> None:
    """Without ranges all that is in front is read again each time: that is no progress."""
    opened = []

    def open(_: bool) -> io.BytesIO:
        opened.append(1)
        return Breaking(2000, ranges)

    broken = stream(open, ranges)
    found = bytearray()
    with pytest.raises(SourceUnavailable, match=r"'a' after 8 attempts \(lost\)"):
        copy(broken, found)
    assert found == CONTENT[:2000]
    assert len(opened) <= 1 + 8 + 8  # to get to the last bytes before that place, and to give it up


@pytest.mark.parametrize("ranges", [True, False])
def test_every_byte_comes_once_however_often_it_breaks_off(ranges: bool) -> None:
    ends = iter([100, 90, 700, 1200, 1300, 1290, 4999])
    whole = io.BufferedReader(stream(lambda _: Breaking(next(ends, 10**6), ranges), ranges), 256)
    assert whole.read() == CONTENT
    assert next(ends, None) is None


def test_a_file_of_unknown_size_ends_where_its_bytes_end() -> None:
    whole = stream(lambda _: Breaking(10**6, False), False, None)
    assert whole.read() == CONTENT
    assert not whole.seekable()
    with pytest.raises(io.UnsupportedOperation):
        whole.seek(0, io.SEEK_END)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("buffered", [True, False])
def test_reading_here_and_there(ranges: bool, buffered: bool) -> None:
    made = stream(lambda _: Breaking(10**6, ranges), ranges)
    file = io.BufferedReader(made, 100) if buffered else made
    chosen, expected = random.Random(1), io.BytesIO(CONTENT)
    for _ in range(200):
        whence = chosen.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
        base = {io.SEEK_SET: 0, io.SEEK_CUR: expected.tell(), io.SEEK_END: len(CONTENT)}[whence]
        place = chosen.randrange(len(CONTENT)) if chosen.random() < 0.5 else max(0, expected.tell() - 30)
        assert file.seek(place - base, whence) == expected.seek(place - base, whence)
        count = chosen.randrange(1, 60)
        piece = b""
        while len(piece) < count and (more := file.read(count - len(piece))):
            piece += more
        assert piece == expected.read(count)
        assert file.tell() == expected.tell()


def test_what_is_open_is_closed() -> None:
    opened: list[io.BytesIO] = []
    ends = iter([100, 700])

    def open(_: bool) -> io.BytesIO:
        opened.append(Breaking(next(ends, 10**6), True))
        return opened[-1]

    with stream(open, True) as file:
        copy(file, bytearray())
        assert [one.closed for one in opened] == [True, True, False]
    assert all(one.closed for one in opened)
