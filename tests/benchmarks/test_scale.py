"""The page on what a run takes holds what its commands print, and its measured table what is counted now."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import scale
import scale_plans
from _tracked import SIZES, Case, count

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_page_holds_the_plans_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scale_plans.main()
    _, *tables = capsys.readouterr().out.split("\n**Calculated")
    printed = [line for table in tables for line in table.splitlines()[1:] if line]
    assert len(printed) > 40
    assert [line for line in printed if line not in PAGE.splitlines()] == []


def test_plans_fit_where_they_are_planned_for() -> None:
    for name, setting in scale_plans.PLANS.items():
        assert scale_plans.planned(setting).bytes < 0.85 * setting.memory, name


def test_the_rate_of_preparation_is_the_benchmarks() -> None:
    measured = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"| 100,000 | 16.14 | {scale_plans.PREPARING * 1e6:.1f} |" in measured


def test_shapes_are_the_models() -> None:
    parameters = {"SmolLM2-135M": 134.5, "Qwen2.5-1.5B": 1543.7, "Qwen2.5-7B": 7615.6, "Qwen2.5-72B": 72706.2}
    for name, millions in parameters.items():
        assert scale_plans.size(name, False).parameters / 1e6 == pytest.approx(millions, rel=0.001)


def test_the_measured_table_is_what_is_counted_now(tmp_path: Path) -> None:
    name = "small, one rank"
    written = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} "))
    found = scale.row(name, count(SIZES["small"], tmp_path))
    cells = [cell.strip() for cell in written.strip("|").split("|")]
    assert len(found) == len(cells) == len(scale.COLUMNS)
    for counted, shown in zip(found[1:], cells[1:], strict=True):
        assert bool(counted) == bool(shown)
        if shown:
            assert float(counted) == pytest.approx(float(shown), rel=0.03)


def test_a_row_of_two_ranks_has_all_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    estimate = SimpleNamespace(sent=2.0 * 2**20, bytes=0)
    counted = SimpleNamespace(
        peak=2**20, expected_peak=2**19, sent=2**21, wire=3 * 2**20, operations=1e9, expected_operations=2e9,
        estimate=estimate,
    )  # fmt: skip
    cases: list[Case] = []
    monkeypatch.setattr(scale, "count", lambda case, folder: cases.append(case) or counted)
    monkeypatch.setattr(sys, "argv", ["scale.py", "--sizes", "small"])
    scale.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| small, ")]
    assert [case.ranks for case in cases] == [1, 2, 2]
    assert [cell.strip() for cell in rows[2].strip("|").split("|")] == [
        "small, 2 ranks, FSDP2", "1.0", "0.5", "0.50", "2.00", "2.00", "1.00", "3.00", "1.0", "2.0", "2.00",
    ]  # fmt: skip
