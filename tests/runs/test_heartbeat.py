"""Lines about long work: what they say, and that they come without the work's help."""

from __future__ import annotations

import logging
import time

import pytest

from dskd_lightning.runs.heartbeat import Heartbeat, Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (60, "1 min 0 s"),
        (3_725, "1 h 2 min"),
        (90_000, "1 d 1 h"),
        (float("inf"), ""),
        (float("nan"), ""),
    ],
)
def test_durations_as_one_reads_them(seconds, text) -> None:
    assert duration(seconds) == text


def test_progress_tells_speed_and_time_left(caplog) -> None:
    now = [100.0]
    progress = Progress("teacher cache", 4_000, "tokens", clock=lambda: now[0])
    now[0] += 10
    assert progress.line() == "teacher cache: 0 of 4,000 tokens (0%), 10 s so far"
    progress.done = 1_000
    assert progress.line() == "teacher cache: 1,000 of 4,000 tokens (25%), 100.0 a second, 30 s left"
    progress.begin("preparing", None)
    now[0] += 4
    progress.done = 6
    assert progress.line() == "preparing: 6 tokens, 1.5 a second, 4 s so far"


def test_time_left_follows_from_a_share_and_what_was_done_before_says_nothing_of_speed() -> None:
    now = [0.0]
    progress = Progress("preparing", None, "records", clock=lambda: now[0])
    progress.done, progress.share = 500, 0.5
    now[0] += 60  # which finding the place again took
    progress.go_on()
    now[0] += 10
    assert progress.line() == "preparing: 500 records (50%), 10 s so far"
    progress.done, progress.share = 600, 0.6
    assert progress.line() == "preparing: 600 records (60%), 10.0 a second, 40 s left"
    progress.share = None
    assert progress.line() == "preparing: 600 records, 10.0 a second, 10 s so far"
    known = Progress("preparing", 1_000, "records", clock=lambda: now[0])
    known.done = 500
    known.go_on()
    now[0] += 10
    known.done = 600
    assert known.line() == "preparing: 600 of 1,000 records (60%), 10.0 a second, 40 s left"


def test_lines_come_while_a_single_step_blocks_and_never_afterwards(caplog) -> None:
    logger = logging.getLogger("dskd_lightning.runs.heartbeat")
    caplog.set_level(logging.INFO, logger.name)
    deadline = time.monotonic() + 20
    with Heartbeat(lambda: "still here", seconds=0.02):
        while len(caplog.records) < 3 and time.monotonic() < deadline:
            time.sleep(0.3)  # a step
    said = len(caplog.records)
    assert said >= 3
    assert {record.getMessage() for record in caplog.records} == {"still here"}
    time.sleep(0.1)
    assert len(caplog.records) == said
