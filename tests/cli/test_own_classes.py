"""A user's own subclasses of module and data module on the command line, by class path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked_runs import dskd_forked
from tiny_runs import write_config

from dskd_lightning.cli.main import main
from dskd_lightning.launch.card import model_card
from dskd_lightning.launch.own_classes import OwnClasses

PACKAGE = '''
import lightning as L
from torch.utils.data import DataLoader

import dskd_lightning as dl


class Module(dl.DistillationModule):
    """Adds a constant to the loss.

    Args:
        bonus: the constant.
    """

    def __init__(self, *args, bonus: float = 0.0, **options):
        super().__init__(*args, **options)
        self.save_hyperparameters()
        self.bonus = bonus

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("own/bonus", self.bonus, batch_size=1)
        return loss + self.bonus


class Data(dl.InstructionDataModule):
    def __init__(self, *args, shout: bool = False, **options):
        super().__init__(*args, **options)
        self.shout = shout


class Rows(L.LightningDataModule):
    """Data of another kind: loaders of rows in memory."""

    def __init__(self, count: int, student: dl.StudentSpec, teacher: list[dl.TeacherSpec] | None = None):
        super().__init__()
        self.count, self.collator = count, dl.DistillationCollator(student, teacher)

    def train_dataloader(self):
        rows = [{"prompt": f"Say {n}.", "response": f"number {n}"} for n in range(self.count)]
        return DataLoader(rows, batch_size=4, collate_fn=self.collator)

    val_dataloader = test_dataloader = train_dataloader


class Unrelated:
    pass
'''


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    name = "theirs_of_a_user"
    (tmp_path / f"{name}.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def config(folder: Path, model_folder: Any, package: str, **changes: Any) -> Path:
    path = write_config(
        folder, model_folder(seed=1), model_folder(hidden=24, seed=2),
        **{"trainer.max_steps": 1, "completions": {"prompts": 0}, "trainer.max_epochs": 1,
           "trainer.logger": False, **changes},
    )  # fmt: skip
    values = yaml.safe_load(path.read_text())
    values["model"] = {"class_path": f"{package}.Module", "init_args": {**values["model"], "bonus": 0.5}}
    values["data"] = {"class_path": f"{package}.Data", "init_args": values["data"]}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.filterwarnings("ignore")
def test_own_module_and_data_train_resume_and_are_tested(tmp_path, model_folder, package, capsys) -> None:
    from theirs_of_a_user import Module  # type: ignore[import-not-found]

    path = config(tmp_path, model_folder, package, **{"trainer.logger": None})
    log = tmp_path / "log"

    def run(*arguments: str) -> None:
        assert dskd_forked(*arguments, log=log) == 0, log.read_text()[-3000:]

    run("fit", "--config", str(path), "--data.init_args.shout", "true", "--model.bonus=0.25")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["class_path"] == f"{package}.Module"
    assert saved["model"]["init_args"]["bonus"] == 0.25
    assert saved["data"]["class_path"] == f"{package}.Data"
    assert saved["data"]["init_args"]["shout"] is True
    kept = ["--config", str(tmp_path / "run" / "config.yaml")]
    run("fit", *kept, "--ckpt_path", "last", "--trainer.max_steps", "2")
    run("test", *kept, "--responses.enabled", "false")
    again = Module.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert again.hparams.bonus == 0.25
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert "own/bonus" in rows
    card = model_card(tmp_path / "run")
    assert card is not None
    assert "DSKDObjective" in card
    asked = ["--ckpt_path", "last", "--prompt", "hello", "--max_new_tokens", "2"]
    assert main(["chat", str(tmp_path / "run"), "teacher", *asked]) == 0
    assert "teacher: " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_data_of_another_kind_train(tmp_path, model_folder, package) -> None:
    path = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **{"trainer.max_epochs": 1}
    )
    values = yaml.safe_load(path.read_text())
    values["data"] = {"class_path": f"{package}.Rows", "init_args": {"count": 8}}
    path.write_text(yaml.safe_dump(values))
    log = tmp_path / "log"
    assert dskd_forked("fit", "--config", str(path), log=log) == 0, log.read_text()[-3000:]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2


@pytest.mark.filterwarnings("ignore")
def test_printed_config_names_the_classes(tmp_path, model_folder, package, capsys) -> None:
    path = config(tmp_path, model_folder, package)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == f"{package}.Module"
    assert printed["model"]["init_args"]["bonus"] == 0.5
    assert printed["data"]["init_args"]["val_split"] == 4


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("model", "no_such_package.Module", "can't be imported"),
        ("model", "theirs_of_a_user.Nothing", "can't be imported"),
        ("model", "theirs_of_a_user.Unrelated", "no subclass of DistillationModule"),
        ("data", "theirs_of_a_user.Module", "no subclass of LightningDataModule"),
    ],
)
def test_other_classes_are_one_sentence(package, capsys, key, name, words) -> None:
    assert main(["fit", f"--{key}.class_path={name}"]) == 2
    said = capsys.readouterr().err
    assert f"{key}.class_path: {name}" in said
    assert words in said


def test_settings_beside_a_class_path_are_one_sentence(tmp_path, package, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": f"{package}.Module", "bonus": 1}}))
    assert main(["fit", "--config", str(path)]) == 2
    assert "model.bonus: beside model.class_path it belongs under model.init_args" in capsys.readouterr().err


def test_configs_without_classes_are_left_alone(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {student: {source: x}}\n")
    arguments = ["fit", f"--config={path}", "-c", str(path), "--model.projector_lr", "1e-3", "--print_config"]
    found = OwnClasses(arguments)
    assert found.arguments == ["fit", "--config", str(path), "-c", str(path), *arguments[4:]]
    assert not found.paths
