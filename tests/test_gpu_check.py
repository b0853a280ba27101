"""`make gpu-check` is dry-run on a GPU that isn't there, so that no typo fails it once one is."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_checks.features import fitted
from gpu_checks.setup import OBJECTIVES, Setup
from gpu_checks.training import train
from pretended_gpu import PretendedGpu
from torch import Tensor

from dskd_lightning.functional import JensenShannon
from tests import gpu_check

PARTS = ("^loss|^fused|^step|^JSD", "^train .*runs", "^train .*cached", "^(?!loss|fused|step|JSD|train)")


def liger(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """What Liger's fused divergence gives, a mean over tokens."""
    return JensenShannon(0.5)(hidden @ weight.T, teacher_hidden @ teacher_weight.T).mean()


@pytest.mark.parametrize("part", PARTS)
def test_checks_run_on_the_pretended_gpu(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = SimpleNamespace(LigerFusedLinearJSD=lambda jsd_beta: liger)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=peer))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", peer)
    path = tmp_path / "found.json"
    status = gpu_check.main(["--device", "pretended", "--only", part, "--json", str(path)])
    found = json.loads(path.read_text())["checks"]
    assert [f for f in found if f["outcome"] not in ("ok", "skipped")] == []
    assert status == 0
    assert found
    if part is PARTS[0]:
        assert any("Liger" in f["detail"] and "isn't installed" not in f["detail"] for f in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("part", PARTS)
def test_checks_run_on_a_gpu(part: str) -> None:
    assert gpu_check.main(["--only", part]) == 0


def test_runs_without_float64_and_sparse_tensors() -> None:
    with PretendedGpu(float64=False), gpu_check.quiet():
        setup = Setup("pretended")
        found = {name: gpu_check.run_one(name, partial(fitted, setup, name, {}), 120) for name in OBJECTIVES}
    assert [result for result in found.values() if result.outcome != "ok"] == []


@pytest.mark.parametrize("cached", [False, True])
def test_resumes_caches_tests_and_predicts_without_float64(cached: bool) -> None:
    with PretendedGpu(float64=False), gpu_check.quiet():
        setup = Setup("pretended")
        found = {
            name: gpu_check.run_one(name, partial(train, setup, name, cached, lora=False), 120)
            for name, (kind, *_) in OBJECTIVES.items()
            if kind.needs_teacher or not cached
        }
    assert [result for result in found.values() if result.outcome != "ok"] == []


def test_a_check_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cpu", "--only", "^bf16-mixed DSKD"]) == 0
    assert "0 of 1 failed" in capsys.readouterr().out


def test_a_broken_check_names_its_place_and_the_rest_goes_on() -> None:
    def broken() -> str:
        return gpu_check.checks("nothing", "(")[0][0]

    result = gpu_check.run_one("broken", broken, 60)
    assert result.outcome == "FAILED"
    assert " at " in result.detail
    assert gpu_check.run_one("slow", lambda: __import__("time").sleep(5) or "", 1).outcome == "FAILED"
