"""The original against the distilled model: `dskd test --model teacher`, `dskd compare teacher RUN`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny_runs import dskd_fork, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd_lightning.runs.predictions import read_predictions
from dskd_lightning.study import Study


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("adapted", [False, True])
def test_the_teacher_is_tested_as_it_teaches(model_folder, tmp_path, adapted) -> None:
    """Its own tokenizer, its own weights with the adapter, the student's prompts; the run stays as it is."""
    student = model_folder(seed=1)
    source = model_folder(hidden=24, seed=2, tokenizer="sentencepiece")
    changes = {
        "data.teacher_cache": {},
        "model.objective": {"class_path": "dskd_lightning.objectives.ALMObjective"},
    }
    model = AutoModelForCausalLM.from_pretrained(source)
    if adapted:
        torch.manual_seed(0)
        peft = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        peft.save_pretrained(tmp_path / "adapter")
        model = peft.merge_and_unload()
        changes["model.teacher"] = {"source": source, "adapter": str(tmp_path / "adapter")}
    config = write_config(tmp_path, student, None if adapted else source, **changes)
    run = tmp_path / "run"
    dskd_fork("fit", "--config", str(config))
    dskd_fork("test", "--config", str(config))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix == ".json"}
    done = dskd_fork("test", "--config", str(config), "--model", "teacher")
    assert "evaluating the teacher" in done.stderr
    assert all(path.read_bytes() == content for path, content in before.items())

    found = read_predictions(run / "teacher" / "predictions" / "greedy.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.eval()
    for prediction in found:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prediction.prompt}], add_generation_prompt=True, return_tensors="pt",
            return_dict=True,
        )["input_ids"]  # fmt: skip
        out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert prediction.response == expected.strip() or prediction.response == expected
    assert metrics(run / "teacher")["nll_per_byte"] != metrics(run)["nll_per_byte"]
    assert metrics(run / "teacher")["model"]["checkpoint"] is None
    assert "kl" not in metrics(run / "teacher")

    compared = dskd_fork("compare", "teacher", str(run), "--output", str(tmp_path / "comparison"))
    assert "beside the teacher" in compared.stdout
    summary = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert summary["baseline"] == "teacher"
    (beside,) = summary["against_teacher"]
    assert beside["run"] == "run"
    assert beside["parameters"] > 0
    assert "Beside the teacher" in (tmp_path / "comparison" / "report.html").read_text()


def test_a_study_has_a_row_for_its_teacher(model_folder, tmp_path) -> None:
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    study = tmp_path / "study.yaml"
    variants = {"teacher": {"model": "teacher"}, "untrained": {"train": False}}
    study.write_text(
        yaml.safe_dump({"base": [config.name], "output": str(tmp_path / "s"), "variants": variants})
    )
    assert [(v.train, v.teacher) for v in Study.read(study).variants] == [(False, True), (False, False)]
    dskd_fork("study", str(study))
    table = json.loads((tmp_path / "s" / "table.json").read_text())
    assert table["teacher"]["perplexity_per_byte"] != table["untrained"]["perplexity_per_byte"]
    assert "kl" not in table["teacher"]
    summary = json.loads((tmp_path / "s" / "report" / "comparison.json").read_text())
    assert [item["run"] for item in summary["against_teacher"]] == ["untrained"]


@pytest.mark.parametrize(
    ("command", "changes", "more", "message"),
    [
        ("test", {}, [], "names no teacher"),
        ("fit", {}, [], "with validate, test or predict"),
        ("test", {}, ["--ckpt_path", "last"], "leave --ckpt_path out"),
        ("test", {"model.teacher": [{"source": "T"}, {"source": "T"}],
                  "model.objective": [{"class_path": "dskd_lightning.objectives.DSKDObjective"}] * 2}, [],
         "names 2 teachers"),
    ],
)  # fmt: skip
def test_what_can_t_be_evaluated_is_one_sentence(
    model_folder, tmp_path, command, changes, more, message
) -> None:
    source = model_folder(seed=1)
    changes = json.loads(json.dumps(changes).replace('"T"', json.dumps(source)))
    if "model.objective" not in changes:
        changes["model.objective"] = {"class_path": "dskd_lightning.objectives.SFTObjective"}
    config = write_config(tmp_path, source, None, **changes)
    refused = dskd_fork(command, "--config", str(config), "--model=teacher", *more, check=False)
    assert refused.returncode == 2
    assert message in refused.stderr


def test_a_study_knows_no_other_model(tmp_path) -> None:
    (tmp_path / "base.yaml").write_text("{}")
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"base": ["base.yaml"], "variants": {"a": {"model": "student"}}}))
    from dskd_lightning.errors import UserError

    with pytest.raises(UserError, match=r"variants\.a\.model"):
        Study.read(study)
