"""`dskd` as a user runs it: train, resume, evaluate, export, and every mistake's sentence."""

from __future__ import annotations

import csv
import errno
import json
import logging
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from tiny_runs import dskd, dskd_fork, write_config, write_data
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from dskd_lightning.cli import main
from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object
from dskd_lightning.launch.trained import open_run

CMA = "dskd_lightning.objectives.DSKDCrossAttentionObjective"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder):
    """A finished LoRA run."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(
        folder, model_folder(seed=1), model_folder(hidden=24, seed=2), **{"model.student.lora": {"rank": 2}}
    )
    dskd("fit", "--config", str(config))
    return folder


def test_fit_leaves_a_complete_run_folder(trained):
    run = trained / "run"
    assert {"best.ckpt", "last.ckpt"} == {path.name for path in (run / "checkpoints").iterdir()}
    assert (run / "config.yaml").is_file()
    settings = yaml.safe_load((run / "tensorboard/hparams.yaml").read_text())
    assert settings["model"]["objective"]["class_path"].endswith("DSKDObjective")
    with (run / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for name in ("train/loss", "train/t2s_kd", "train/s2t_kd", "train/tokens", "val/kl", "val/nll_per_byte"):
        assert any(row.get(name) for row in rows), name


def test_a_fit_without_steps_still_says_what_it_cost(tmp_path, model_folder):
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    dskd_fork("fit", "--config", str(config), "--trainer.max_epochs=0")
    assert json.loads((tmp_path / "run/training.json").read_text())["steps"] == 0


def test_checkpoints_hold_what_was_trained_alone(trained):
    checkpoint = torch.load(trained / "run/checkpoints/last.ckpt", weights_only=True)
    names = checkpoint["state_dict"].keys()
    assert names
    assert all("lora_" in name or name.startswith("objectives.") for name in names)


def test_test_scores_the_best_checkpoint(trained):
    dskd("test", "--config", str(trained / "run/config.yaml"))
    metrics = json.loads((trained / "run/metrics.json").read_text())
    assert metrics["perplexity_per_token"] == pytest.approx(
        torch.tensor(metrics["nll_per_token"]).exp().item(), rel=1e-4
    )
    assert {"kl", "agreement", "rougeL", "exact_match"} <= metrics.keys()
    lines = (trained / "run/predictions/greedy.jsonl").read_text().splitlines()
    assert len(lines) == 4


def test_export_is_a_plain_folder(trained, tmp_path):
    file = tmp_path / "student.gguf"
    dskd_fork("export", str(trained / "run"), str(tmp_path / "student"), "--gguf", str(file))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    for name, weight in packed.state_dict().items():  # adapters merged in both
        torch.testing.assert_close(weight, model.state_dict()[name].float(), rtol=1e-3, atol=1e-4)
    assert not any("lora" in name for name in model.state_dict())
    assert "`DSKDObjective`" in (tmp_path / "student/README.md").read_text(encoding="utf-8")
    assert not any(
        "dskd" in file.read_text(errors="ignore") for file in (tmp_path / "student").glob("*.json")
    )


def test_a_second_run_needs_another_folder(trained):
    result = dskd_fork("fit", "--config", str(trained / "config.yaml"), check=False)
    assert result.returncode == 2
    assert "already holds a run" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.train": "missing.jsonl"}, "missing.jsonl' doesn't exist"),
        ({"data.max_prompt_length": 96}, "leaves no room for a response"),
        ({"model.student.lora": {"targets": ["nothing_like_this"]}}, "nothing_like_this"),
        ({"model.student.source": "no/such/folder/at/all"}, "no/such/folder/at/all"),
        ({"model.teacher": None}, "learns from a teacher"),
        ({"model.projector_lr": -1.0}, "model.projector_lr: -1.0 must be a number of at least 0"),
        (
            {"model.objective": {"class_path": CMA, "init_args": {"attention": {"byte_prior": -1.0}}}},
            "error: byte_prior of CrossModelAttention must not be negative, but is -1.0.\n",
        ),
        (
            {"model.objective": [{"class_path": CMA, "init_args": {"kq_ratio": -1.0}}]},
            "error: kq_ratio",
        ),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, model_folder, capsys, changes, sentence):
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **changes)
    assert main(["fit", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{not json", "data.jsonl:2"),
        ('{"prompt": "Hi.", "response": ""}', "data.jsonl:2"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "data.jsonl:2"),
    ],
)
def test_bad_records_name_file_and_line(tmp_path, model_folder, capsys, line, sentence):
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    good = (tmp_path / "data.jsonl").read_text().splitlines()[0]
    (tmp_path / "data.jsonl").write_text(f"{good}\n{line}\n")
    assert main(["fit", "--config", str(config)]) == 2
    assert sentence in capsys.readouterr().err


def test_optimizers_with_8_bit_states_resume(tmp_path, model_folder):
    pytest.importorskip("bitsandbytes")
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    optimizer = ["--model.optimizer=bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr=0.01"]
    dskd_fork("fit", "--config", str(config), *optimizer, "--trainer.max_epochs=1")
    dskd_fork("fit", "--config", str(config), *optimizer, "--ckpt_path=last")
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    states = tree_leaves(checkpoint["optimizer_states"])
    assert any(torch.is_tensor(state) and state.dtype == torch.uint8 for state in states)
    assert checkpoint["epoch"] == 1


def test_different_vocabularies_are_refused(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder(seed=1), model_folder(tokenizer="sentencepiece", hidden=24))
    assert main(["fit", "--config", str(config)]) == 2
    assert "vocabular" in capsys.readouterr().err


def test_nan_loss_stops_training(tmp_path, model_folder, capsys):
    changes = {"model.optimizer.init_args.lr": 1e30, "model.warmup_ratio": 0.0}
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **changes)
    assert main(["fit", "--config", str(config)]) == 2
    assert "The loss is" in capsys.readouterr().err


def test_full_disk_is_one_sentence(tmp_path, model_folder, capsys, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "last.ckpt")

    monkeypatch.setattr(SingleDeviceStrategy, "save_checkpoint", full)
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    assert main(["fit", "--config", str(config)]) == 3
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize("error", ["EPERM", "ENAMETOOLONG", "ENOTDIR", "EEXIST", "EFBIG", "EISDIR", "EIO"])
def test_an_unusable_place_is_one_sentence(monkeypatch, capsys, error):
    number = getattr(errno, error)

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), b"some/\x1b[31mplace")

    monkeypatch.setattr(sys.modules["dskd_lightning.cli.main"], "run_function", fail)
    assert main(["export", "a", "b"]) == 3
    message = capsys.readouterr().err
    assert os.strerror(number) in message
    assert "place" in message
    assert "\x1b" not in message
    assert len(message.splitlines()) == 1


def test_a_thread_that_can_write_no_more_is_one_sentence(monkeypatch, capsys):
    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "events.out")

    def run(*_: object, **__: object) -> None:
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    monkeypatch.setattr(sys.modules["dskd_lightning.cli.main"], "run_function", run)
    before = threading.excepthook
    assert main(["export", "a", "b"]) == 0
    assert threading.excepthook is before
    message = capsys.readouterr().err
    assert message.startswith("dskd: error: cannot read or write events.out: No space left on device; free")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "place", ["data.jsonl", "data.jsonl/run", "dangling", "x" * 300], ids=lambda p: p[:12]
)
def test_an_output_that_cannot_be_made_is_one_sentence(tmp_path, model_folder, capsys, place):
    sft = {"class_path": "dskd_lightning.objectives.SFTObjective"}
    config = write_config(tmp_path, model_folder(seed=1), None, **{"model.objective": sft})
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    assert main(["fit", "--config", str(config), "--output", str(tmp_path / place)]) in (2, 3)
    message = capsys.readouterr().err
    assert "dskd: error: " in message
    assert "Traceback" not in message


@pytest.mark.parametrize("content", [b"model: \xff", b"model: [", b"[" * 5000, b"- 1"])
def test_a_damaged_config_is_one_sentence(tmp_path, capsys, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    for arguments in (["test", "--config", str(path)], ["test", f"--config={path}"]):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert "config.yaml" in message
        assert "Traceback" not in message
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.ckpt").touch()
    with pytest.raises(UserError, match=r"config\.yaml"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    "content",
    ['"\\e[31mkey": 3', 'model: {objective: {class_path: "a.\\e[31mb"}}', 'trainer: {"\\e[31mkey": 3}'],
    ids=["key", "class", "option"],
)
def test_nothing_of_a_config_steers_the_terminal(tmp_path, capsys, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tmp_path / "config.yaml")])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "[31m" in message
    assert "\x1b" not in message


def test_nothing_that_is_quoted_steers_the_terminal(monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        logging.getLogger("dskd_lightning.data").warning("unused field %s", "\x1b]0;title\x07")
        raise UserError("template says \x1b[2Jgone \u202e")

    monkeypatch.setattr(sys.modules["dskd_lightning.cli.main"], "run_function", fail)
    assert main(["export", "a", "b"]) == 2
    message = capsys.readouterr().err
    assert "title" in message
    assert "gone" in message
    assert not {"\x1b", "\x07", "\u202e"} & set(message)


def test_unreadable_file_is_one_sentence(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "\xff\xfe", "response": "x"}\n')
    assert main(["fit", "--config", str(config)]) == 2
    message = capsys.readouterr().err
    assert "data.jsonl" in message
    assert "Traceback" not in message


def test_options_are_not_abbreviated(tmp_path, model_folder):
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    result = dskd_fork("fit", "--config", str(config), "--trainer.max_epoch", "1", check=False)
    assert result.returncode == 2
    assert "max_epoch" in result.stderr
    assert not (tmp_path / "run").exists()


def test_users_loggers_stand_beside_the_run_folders_log(tmp_path, model_folder):
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "other")},
    }
    config = write_config(
        tmp_path,
        model_folder(seed=1),
        None,
        **{
            "trainer.logger": [logger],
            "trainer.max_epochs": 1,
            "model.objective": {"class_path": "dskd_lightning.objectives.SFTObjective"},
        },
    )
    dskd_fork("fit", "--config", str(config))
    assert "val/nll_per_byte" in (tmp_path / "run/metrics.csv").read_text()
    assert any((tmp_path / "other").rglob("metrics.csv"))
    assert not (tmp_path / "run/tensorboard").exists()


@pytest.mark.parametrize("stop", [3, 5])
def test_run_stopped_by_max_steps_goes_on(tmp_path, model_folder, stop):
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    arguments = ["fit", "--config", str(config), "--trainer.max_epochs", "3"]
    dskd_fork(*arguments, "--trainer.max_steps", str(stop))
    dskd_fork(*arguments, "--ckpt_path", "last")
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3 * 4
    with (tmp_path / "run/metrics.csv").open() as stream:
        steps = [int(row["step"]) for row in csv.DictReader(stream) if row.get("train/loss")]
    assert steps == list(range(3 * 4))


def test_unknown_command(capsys):
    assert main(["distill"]) == 2
    assert "dskd --help" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert main([]) == 0
    assert "fit" in capsys.readouterr().out
    assert main(["--version"]) == 0


@pytest.mark.parametrize("command", ["fit", "test"])
def test_help_of_the_trainer_names_keys_that_there_are(command, capsys):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 96
    with pytest.raises(SystemExit) as stop:
        main([command, "--help-all"])
    assert stop.value.code == 0
    known = capsys.readouterr().out
    inner = ("--model.objective.", "--model.optimizer.")  # of a class that is chosen
    optional = re.compile(r"(--model\.student\.(?:lora|prune)|--model\.teacher|--data\.teacher_cache)\.")
    for key in re.findall(r"--(?!KEY|help-all|print_config)[\w.]+", said):
        wanted = optional.match(key)[1] if optional.match(key) else key
        assert key.startswith(inner) or f"{wanted} " in known, key


def test_help_and_lists_start_without_torch():
    code = (
        "import sys; from dskd_lightning.cli.main import main\n"
        "main(['fit', '--help']); main(['config', 'list'])\n"
        "sys.exit(' '.join({'torch', 'lightning', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stderr.strip(), done.returncode) == ("", 1)


def test_users_own_objective_needs_no_registration(tmp_path, model_folder, monkeypatch):
    (tmp_path / "my_objectives.py").write_text(
        "from dskd_lightning.objectives import DSKDObjective\n"
        "class Mine(DSKDObjective):\n"
        "    def __init__(self, extra: float = 1.0, kd_ratio: float = 0.5) -> None:\n"
        "        super().__init__(kd_ratio=kd_ratio)\n"
        "        self.extra = extra\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    objective = {"class_path": "my_objectives.Mine", "init_args": {"extra": 2.0}}
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **{"model.objective": objective}
    )
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "1"]) == 0


def test_composed_configs_and_printed_config(tmp_path, model_folder):
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    (tmp_path / "more.yaml").write_text("model:\n  student:\n    lora:\n      rank: 3\n")
    printed = dskd_fork(
        "fit", "--config", str(config), "--config", str(tmp_path / "more.yaml"), "--print_config"
    ).stdout
    values = yaml.safe_load(printed)
    assert values["model"]["student"]["lora"]["rank"] == 3
    assert values["model"]["teacher"]["source"] == model_folder(hidden=24, seed=2)


def test_study_compares_variants(tmp_path, model_folder, monkeypatch, capsys):
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2),
        **{"trainer.enable_progress_bar": True},
    )  # fmt: skip
    sft = {"model": {"objective": {"class_path": "dskd_lightning.objectives.SFTObjective"}}}
    before = "before_any_training_at_all"  # with which all columns are wider than 80
    study = {
        "output": str(tmp_path / "study"),
        "base": [config.name],
        "variants": {
            before: {"train": False},
            "sft": {"config": sft},
            "dskd": None,
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    said = dskd("study", str(tmp_path / "study.yaml"))
    assert [int(step) for step in re.findall(r"^fit: step (\d+) of 8, ", said.stderr, re.M)] == [1, 8, 1, 8]
    assert "\r" not in said.stdout + said.stderr
    rows = json.loads((tmp_path / "study/table.json").read_text())
    assert list(rows) == [before, "sft", "dskd"]
    assert rows[before]["perplexity_per_token"] > rows["dskd"]["perplexity_per_token"]
    assert "training_seconds" not in rows[before]
    assert (tmp_path / "study/curves.png").stat().st_size > 1000
    assert (tmp_path / "study/report/report.html").is_file()
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert main(["study", str(tmp_path / "study.yaml")]) == 0
    shown = capsys.readouterr().out
    tables, paths = shown.split("Report: ")[0], shown.split("Report: ")[1]
    tables += paths.split("\n", 1)[1].split("table, curves and report are in")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables
    words = tables.split()
    for word in ("difference", "win/tie/loss", "perplexity", "agreement", "ROUGE-L", "GiB"):
        assert word in words
    for values in rows.values():
        assert f"{values['perplexity_per_token']:.2f}" in words


def test_grid_trains_every_point_and_tests_the_best(tmp_path, model_folder):
    write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **{"trainer.max_epochs": 1})
    study = {
        "output": str(tmp_path / "study"),
        "base": ["config.yaml"],
        "report": False,
        "variants": {"DSKD": {"grid": {"model.optimizer.init_args.lr": [1e-6, 1e-2]}}},
    }
    (tmp_path / "grid.study.yaml").write_text(yaml.safe_dump(study))
    dskd("study", str(tmp_path / "grid.study.yaml"))
    grid = tmp_path / "study/grid/DSKD"
    chosen = json.loads((grid / "grid.json").read_text())
    assert chosen["chosen"] == {"model.optimizer.init_args.lr": 1e-2}
    loser, best = chosen["folders"]
    assert not (grid / loser / "checkpoints").exists()
    assert (tmp_path / "study/DSKD/checkpoints/best.ckpt").is_file()
    assert (tmp_path / "study/DSKD").resolve() == grid / best
    result = json.loads((tmp_path / "study/DSKD/variant.json").read_text())
    assert result["trained"]
    assert result["crc32"]
    assert result["training"] == read_object(tmp_path / "study/DSKD/training.json", "")
    assert result["training"]["seconds"] > 0
    assert "rougeL" in result["test"]
    assert "DSKD" in (tmp_path / "study/table.md").read_text()


def test_generate_writes_an_instruction_file(tmp_path, model_folder):
    data = write_data(tmp_path / "data.jsonl", 3)
    data.write_text(data.read_text().replace('"}\n', '", "id": 7}\n', 1))
    arguments = ["--max_new_tokens", "4"]
    dskd_fork("generate", model_folder(seed=1), str(data), str(tmp_path / "out.jsonl"), *arguments)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == [f"Say the number {i}." for i in range(3)]
    assert all(line["messages"][-1]["role"] == "assistant" for line in lines)
    assert [line.get("id") for line in lines] == [7, None, None]
