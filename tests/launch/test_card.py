"""Model cards: what they say, what they leave to the user, and what must not get into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_object
from dskd_lightning.launch.card import model_card


def run_folder(tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    config: dict[str, Any] = {
        "seed_everything": 42,
        "model": {
            "student": {"source": "Qwen/Qwen2.5-0.5B", "lora": {"rank": 16, "alpha": 32}},
            "teacher": {"source": str(tmp_path / "secret home" / "teacher-7b"), "quantization": "4bit"},
            "objective": {
                "class_path": "dskd_lightning.objectives.DSKDObjective",
                "init_args": {
                    "kd_ratio": 0.5,
                    "divergence": {"class_path": "a.b.ReverseKL", "init_args": {}},
                },
            },
        },
        "data": {
            "train": [str(tmp_path / "secret home" / "train|<b>.jsonl")],
            "batch_size": 8,
            "max_length": 512,
        },
        "trainer": {"max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": 4},
    }
    for key, value in changes.items():
        config["model"][key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def test_a_card_names_what_the_student_was_made_of(tmp_path) -> None:
    folder = run_folder(tmp_path)
    (folder / "metrics.json").write_text(json.dumps({"rougeL": 21.34, "kl": 2.6612, "agreement": 0.379}))
    (folder / "training.json").write_text(json.dumps({"seconds": 120, "steps": 166}))
    card = model_card(folder)
    assert card is not None
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-0.5B",
        "tags": ["knowledge-distillation", "dskd-lightning"],
    }
    assert "# license: to confirm" in front
    for fact in (
        "Qwen/Qwen2.5-0.5B (lora: rank: 16, alpha: 32)", "teacher-7b (quantization: 4bit)", "`DSKDObjective`",
        "kd_ratio: 0.5, divergence: ReverseKL", "max_epochs: 3, accumulate_grad_batches: 4, batch size 8",
        "2.0 minutes, 166 steps", "| ROUGE-L of generated responses | 21.3 |", "| 37.9% |", "| 2.661 |",
    ):  # fmt: skip
        assert fact in text, fact
    assert text.count("**to confirm**") == 4  # use, and the licences of student, teacher and data
    assert "secret home" not in card
    assert "train\\|&lt;b>.jsonl" in text


def test_a_run_without_teacher_and_tests(tmp_path) -> None:
    card = model_card(run_folder(tmp_path, teacher=None))
    assert card is not None
    assert "| Teacher | none |" in card
    assert "Not tested" in card


def test_a_card_has_the_paired_tests_of_a_comparison(tmp_path) -> None:
    folder, compared = run_folder(tmp_path), tmp_path / "comparison.json"
    candidate = {
        "name": "mine", "mean": 21.3, "difference": {"mean": 1.2, "low": 0.3, "high": 2.1},
        "adjusted_p_value": 0.013, "outcome": "better",
    }  # fmt: skip
    found = {"metric": "rougeL", "baseline": "SFT", "baseline_mean": 20.1, "candidates": [candidate]}
    compared.write_text(json.dumps(found))
    card = model_card(folder, tmp_path)
    assert card is not None
    assert "| mine | 21.30 | +1.20 (+0.30, +2.10) | 0.013 | better |" in card
    assert "the baseline is SFT (20.10)" in card
    write_object(compared, found)
    compared.write_text(compared.read_text().replace("0.013", "0.003"))
    with pytest.raises(UserError, match=r"comparison\.json: isn't as it was written"):
        model_card(folder, compared)
    compared.write_text(json.dumps({**found, "candidates": []}))
    with pytest.raises(UserError, match="does not compare the run 'mine'"):
        model_card(folder, compared)


def test_a_run_that_python_made_has_no_card(tmp_path) -> None:
    assert model_card(tmp_path) is None


def test_a_card_shows_urls_of_data_without_their_signature(tmp_path) -> None:
    folder = run_folder(tmp_path)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["train"] = ["https://me:pass@host/train.jsonl?sig=secret", "s3://bucket/train-*.parquet"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    card = model_card(folder)
    assert card is not None
    assert "https://***@host/train.jsonl?***, s3://bucket/train-*.parquet" in card
    assert "secret" not in card
