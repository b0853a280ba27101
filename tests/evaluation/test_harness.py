"""lm-evaluation-harness: as a stub everywhere, itself where it is installed."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.harness import run_harness


def test_harness(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="at least one task"):
        run_harness(tmp_path, [])
    with pytest.raises(UserError, match="no exported model"):
        run_harness(tmp_path, ["arc_easy"])
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("dskd_lightning.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lm_eval\[hf\]'"):
        run_harness(tmp_path, ["arc_easy"])
    monkeypatch.setattr("dskd_lightning.evaluation.harness.find_spec", lambda name: object())
    with pytest.raises(UserError, match="is no folder of task files"):
        run_harness(tmp_path, ["arc_easy"], include_path=tmp_path / "none")
    calls = []

    def simple_evaluate(**options):
        calls.append(options)
        return {"results": {"arc_easy": {"acc,none": 0.25, "alias": "arc_easy", "sample_len": 5}}}

    def match_tasks(tasks):
        return [task for task in tasks if task == "arc_easy"]

    tasks = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(match_tasks=match_tasks))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    with pytest.raises(UserError, match="knows no task arc_eazy"):
        run_harness(tmp_path, ["arc_easy", "arc_eazy"])
    assert run_harness(tmp_path, ["arc_easy"], limit=5) == {"arc_easy/acc,none": 0.25}
    assert calls[0]["model_args"] == f"pretrained={tmp_path}"
    assert calls[0]["limit"] == 5
    assert calls[0]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_installed_harness_scores_an_own_task(tmp_path, model_folder) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    rows = [{"question": "fox", "choices": ["apples", "plums"], "label": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "fruits",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "fruits.yaml").write_text(json.dumps(task))
    scores = run_harness(model_folder(), ["fruits"], batch_size=2, include_path=tmp_path)
    assert scores["fruits/acc,none"] == 0.5  # one question, each of its answers right twice
    with pytest.raises(UserError, match="knows no task fruitz"):
        run_harness(model_folder(), ["fruitz"], include_path=tmp_path)
