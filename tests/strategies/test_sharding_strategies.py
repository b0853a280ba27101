"""Two processes that shard student and teacher train, save and resume as one process does."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
from tiny_runs import dskd, write_config

from dskd_lightning.errors import UserError
from dskd_lightning.strategies.layers import decoder_layers

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "strategy"
TWO = ["--config", str(CONFIGS / "fsdp2.yaml"), "--trainer.devices", "2"]


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as stream:
        return [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_sharded_processes_train_as_one(model_folder, tmp_path, lora):
    changes = {
        "data.batch_size": 3,
        "trainer.gradient_clip_val": 0.5,
        "model.lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.ConstantLR",
            "init_args": {"factor": 1.0},
        },
        "model.student.lora": lora,
    }
    teacher = model_folder(hidden=24, seed=2)
    config = str(write_config(tmp_path, model_folder(seed=1), teacher, **changes))
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    dskd("fit", "--config", config, "--output", str(one), "--trainer.devices", "1", "--data.batch_size", "6")
    dskd("fit", "--config", config, *TWO, "--output", str(two))
    assert len(losses(one)) == len(losses(two)) > 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    expected, actual = weights(one), weights(two)
    assert expected.keys() == actual.keys()
    assert not any(name.startswith("teachers.") for name in actual)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4)

    dskd("fit", "--config", config, *TWO, "--output", str(resumed), "--trainer.max_epochs", "1")
    dskd("fit", "--config", config, *TWO, "--output", str(resumed), "--ckpt_path", "last")
    assert losses(resumed) == pytest.approx(losses(two), rel=1e-5)


def test_samples_of_a_sharded_student_are_refused(model_folder, tmp_path):
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **{"model.on_policy": {}}
    )
    from dskd_lightning.launch.lightning_cli import DistillationCLI

    with pytest.raises(UserError, match="or leave on_policy out"):
        DistillationCLI(args=["--config", str(config), *TWO], run=False)


def test_decoder_layers_of_student_and_teacher(model_folder):
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(model_folder(kind=kind)) for kind in ("llama", "gpt2")]
    layers = decoder_layers(torch.nn.ModuleList(models))
    assert layers == [*models[0].model.layers, *models[1].transformer.h]


def test_model_without_a_list_of_layers_is_refused(model_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder())
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match="no list of 2 layers"):
        decoder_layers(model)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_fragment_combines_with_any_config(model_folder, tmp_path, path):
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    printed = dskd("fit", "--config", str(config), "--config", str(path), "--print_config").stdout
    strategy = yaml.safe_load(path.read_text())["trainer"]["strategy"]
    actual = yaml.safe_load(printed)["trainer"]["strategy"]
    wanted = strategy if isinstance(strategy, str) else strategy["class_path"]
    assert (actual if isinstance(actual, str) else actual["class_path"]) == wanted
