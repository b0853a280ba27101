"""What a command line does to the loggers of its process, and that tests after it don't feel it."""

from __future__ import annotations

import logging

import pytest

from dskd_lightning.runs.console import configure_output


@pytest.fixture(scope="module")
def configured() -> None:
    configure_output()


@pytest.mark.parametrize("time", [1, 2])
def test_loggers_that_a_fixture_configured_are_heard_once(configured, caplog, time) -> None:
    assert logging.getLogger("dskd_lightning").propagate
    assert not logging.getLogger("dskd_lightning").handlers
    caplog.set_level(logging.INFO, "dskd_lightning")
    logging.getLogger("dskd_lightning.somewhere").info("time %d", time)
    assert caplog.messages == [f"time {time}"]


def test_control_characters_do_not_reach_the_terminal(capsys) -> None:
    configure_output()
    logging.getLogger("dskd_lightning.somewhere").warning("a\x1b[2Jb")
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.startswith("a")
