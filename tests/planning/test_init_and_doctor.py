"""`dskd init` writes configs that train, and `dskd doctor` finds what would keep one from starting."""

from __future__ import annotations

import pytest
import yaml
from tiny_runs import write_config, write_data

from dskd_lightning.cli.main import main
from dskd_lightning.planning import Machine, examine, plan

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture
def data(tmp_path) -> str:
    return str(write_data(tmp_path / "train data.jsonl", count=40))


def init(tmp_path, teacher: str, student: str, data: str) -> str:
    file = str(tmp_path / "mine.yaml")
    arguments = ["--teacher", teacher, "--student", student, "--data", data, "--yes"]
    assert main(["init", "--file", file, "--output", str(tmp_path / "run"), *arguments]) == 0
    return file


def test_what_init_writes_passes_the_doctor_and_trains(model_folder, data, tmp_path, capsys) -> None:
    file = init(tmp_path, model_folder(hidden=24, seed=2), model_folder(seed=1), data)
    said = capsys.readouterr().out
    assert "next: dskd doctor" in said
    config = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert config["model"]["objective"]["class_path"] == "dskd_lightning.objectives.DSKDv2Objective"
    assert config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"] == 16
    options = [f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]
    assert main(["doctor", file]) == 0
    findings = capsys.readouterr().out
    for what in ("student", "teacher", "data.train", "objective", "disk", "memory", "time"):
        assert f"ok      {what}" in findings
    assert "failed" not in findings
    assert main(["fit", "--config", file, *options]) == 0
    assert main(["init", "--file", file, "--teacher", "a", "--student", "b", "--data", data]) == 2
    assert "is there already" in capsys.readouterr().err


def test_other_vocabularies_get_another_objective(model_folder, data, tmp_path) -> None:
    teacher, student = model_folder(tokenizer="sentencepiece"), model_folder(chat=False)
    found = plan(teacher, student, data, "runs/x", Machine("test", 2**36, 1e11, 2e11, False))
    config = yaml.safe_load(found.text)
    assert found.fits
    assert not config["model"]["objective"]["class_path"].endswith("DSKDv2Objective")
    assert config["model"]["student"]["prompt_template"] == "{prompt}\n\n"
    assert "prompt_template" not in config["model"]["teacher"]
    assert config["data"]["train"] == data


def test_a_processor_that_only_emulates_16_bits_computes_in_32(model_folder, data, monkeypatch) -> None:
    slow = Machine("test", 2**36, 3e10, 4e9, False)
    teacher, student = model_folder(hidden=24, seed=2), model_folder(seed=1)
    config = yaml.safe_load(plan(teacher, student, data, "runs/x", slow).text)
    assert config["trainer"]["precision"] == "32-true"
    assert config["model"]["teacher"]["dtype"] == "float32"
    fast = Machine("test", 2**36, 3e10, 6e10, False)
    config = yaml.safe_load(plan(teacher, student, data, "runs/x", fast).text)
    assert config["trainer"]["precision"] == "bf16-mixed"


def test_little_memory_trains_less_and_says_so(model_folder, data) -> None:
    teacher, student = model_folder(hidden=24, seed=2), model_folder(seed=1)
    poor = plan(teacher, student, data, "runs/x", Machine("test", 2**30, 1e11, 2e11, False))
    assert not poor.fits
    assert "MORE THAN THERE IS" in poor.text
    config = yaml.safe_load(poor.text)
    assert config["model"]["student"]["lora"]["rank"] == 32
    assert config["model"]["student"]["gradient_checkpointing"] is True
    assert config["data"]["batch_size"] == 1


def test_init_that_may_not_ask_needs_all_answers(tmp_path, capsys) -> None:
    assert main(["init", "--file", str(tmp_path / "x.yaml"), "--yes"]) == 2
    assert "--teacher: give one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "what", "sentence"),
    [
        ({"model.teacher.source": "/nowhere"}, "teacher", "No model at '/nowhere'"),
        ({"data.train": "/nowhere.jsonl"}, "data", "nowhere.jsonl"),
        ({"data.max_length": 0}, "config", "max_length"),
    ],
)
def test_the_doctor_names_what_would_fail(model_folder, tmp_path, changes, what, sentence) -> None:
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **changes)
    failed = [finding for finding in examine([str(config)]) if finding.state == "failed"]
    assert [finding.what for finding in failed] == [what]
    assert sentence in failed[0].text


def test_an_objective_of_one_vocabulary_for_two_fails(model_folder, tmp_path, capsys) -> None:
    config = write_config(tmp_path, model_folder(seed=1), model_folder(tokenizer="sentencepiece"))
    assert main(["doctor", str(config)]) == 1
    assert "failed  objective   DSKDObjective compares models of one vocabulary" in capsys.readouterr().out


def test_no_validation_and_lost_examples_are_worth_a_look(model_folder, tmp_path) -> None:
    changes = {"data.val_split": 0, "data.max_length": 30, "data.max_prompt_length": 20}
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **changes)
    looks = {finding.what: finding.text for finding in examine([str(config)]) if finding.state == "look"}
    assert "no validation" in looks["data.val"]
    assert "truncated" in looks["data.train"]
