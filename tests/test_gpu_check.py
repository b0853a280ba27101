"""`make gpu-check` is dry-run on the CPU, so that it can't fail on a typo once a GPU is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import gpu_check

SAMPLE = "^loss|train ETA, cached, LoRA|bf16-mixed DSKD|^generation|responses|resume|packing,|^fused|^step"


def test_checks_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    status = gpu_check.main(["--device", "cpu", "--only", SAMPLE, "--json", str(path)])
    found = json.loads(path.read_text())["checks"]
    assert [f for f in found if f["outcome"] != "ok"] == []
    assert status == 0
    assert len(found) > 35
    assert f"0 of {len(found)} failed" in capsys.readouterr().out


def test_a_broken_check_names_its_place_and_the_rest_goes_on() -> None:
    def broken() -> str:
        return gpu_check.checks("nothing", "(")[0][0]

    result = gpu_check.run_one("broken", broken, 60)
    assert result.outcome == "FAILED"
    assert " at " in result.detail
    assert gpu_check.run_one("slow", lambda: __import__("time").sleep(5) or "", 1).outcome == "FAILED"
