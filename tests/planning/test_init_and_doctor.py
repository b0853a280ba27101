"""`dskd init` writes configs that train, and `dskd doctor` finds what would keep one from starting."""

from __future__ import annotations

import pytest
import yaml
from tiny_runs import write_config, write_data

from dskd_lightning.cli.main import main
from dskd_lightning.planning import Machine, examine, plan
from dskd_lightning.planning.target import Target, parse_bytes

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture
def data(tmp_path) -> str:
    return str(write_data(tmp_path / "train data.jsonl", count=40))


def init(tmp_path, teacher: str, student: str, data: str) -> str:
    file = str(tmp_path / "mine.yaml")
    arguments = ["--teacher", teacher, "--student", student, "--data", data, "--yes"]
    assert main(["init", "--file", file, "--output", str(tmp_path / "run"), *arguments]) == 0
    return file


@pytest.mark.filterwarnings("ignore:The student predicts")  # of two random models either may do so
def test_what_init_writes_passes_the_doctor_and_trains(model_folder, data, tmp_path, capsys) -> None:
    file = init(tmp_path, model_folder(hidden=24, seed=2), model_folder(seed=1), data)
    said = capsys.readouterr().out
    assert "next: dskd doctor" in said
    config = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert config["model"]["objective"]["class_path"] == "dskd_lightning.objectives.DSKDv2Objective"
    assert config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"] == 16
    options = [f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]
    assert main(["doctor", file, "--memory", "4GiB"]) == 0
    findings = capsys.readouterr().out
    for what in ("student", "teacher", "data.train", "objective", "memory", "disk", "time"):
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


def pair(model_folder, tmp_path, **changes) -> str:
    return str(write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **changes))


SHARDED = {
    "trainer.strategy": {
        "class_path": "dskd_lightning.strategies.DSKDModelParallelStrategy",
        "init_args": {"replicas": 2},
    }
}


def test_a_run_is_planned_for_devices_that_are_elsewhere(model_folder, tmp_path, capsys) -> None:
    config = pair(model_folder, tmp_path, **SHARDED, **{"data.teacher_cache": {}, "trainer.max_epochs": 1})
    options = ["--ranks", "64", "--memory", "2GB", "--tflops", "400", "--examples", "1000000000"]
    assert main(["doctor", config, *options]) == 0
    said = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert "GiB of 1.9 free for each rank" in said["memory"]
    assert said["host"].startswith("look")
    assert "plan of an epoch 37.0 GB" in said["host"]
    assert "gradients scattered" in said["network"]
    assert "as long as the products at" in said["network"]
    assert "teacher cache" in said["disk"]
    assert "free for" not in said["disk"]
    # 1e9 examples in batches of 4 on each of 64 ranks
    assert "3,906,250 steps on 64 ranks at 400 TFLOP/s" in said["time"]
    assert main(["doctor", config, *options[:2], "--memory", "500MiB"]) == 1
    said = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert "of 0.5 free" in said["memory"]
    assert said["memory"].startswith("failed")
    assert "--tflops says how long that takes" in said["time"]
    assert "as long as" not in said["network"]


def test_ranks_of_one_machine_share_its_memory(model_folder, tmp_path, monkeypatch) -> None:
    machine = Machine("test", 2**34, 1e11, 2e11, False)
    monkeypatch.setattr(Machine, "measure", lambda accelerator="auto": machine)
    config = pair(model_folder, tmp_path)
    texts = [
        next(f.text for f in examine([config], Target(ranks=ranks)) if f.what == "memory") for ranks in (1, 4)
    ]
    assert "of 16.0 free (" in texts[0]
    assert "of 4.0 free for each rank (" in texts[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ranks", "0"], "--ranks 0: give a whole number from 1 on"),
        (["--examples", "-3"], "--examples -3: give a whole number from 1 on"),
        (["--tflops", "0"], "--tflops 0.0: give what a large product reaches"),
        (["--tflops", "-5"], "--tflops -5.0: give what"),
        (["--memory", "80"], "--memory 80: give a number and a unit, such as 80GiB"),
        (["--memory", "80gib"], "--memory 80gib: give a number and a unit"),
        (["--memory", "1.2.3GB"], "--memory 1.2.3GB: give a number"),
        (["--memory", "0GB"], "--memory 0GB: give a number"),
    ],
)
def test_nonsense_about_devices_is_one_sentence(options, sentence, capsys) -> None:
    assert main(["doctor", "dskd:quickstart", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_ranks_that_cannot_hold_the_copies_fail(model_folder, tmp_path) -> None:
    config = pair(model_folder, tmp_path, **SHARDED)
    (found,) = [f for f in examine([config], Target(ranks=3)) if f.state == "failed"]
    assert "3 devices can't hold replicas=2" in found.text


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24e9), ("1.5TB", 1.5e12), ("512MiB", 2**29)]
)
def test_sizes_with_units(text: str, size: float) -> None:
    assert parse_bytes(text) == size
