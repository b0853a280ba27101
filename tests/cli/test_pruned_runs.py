"""Which layers a run kept is measured once and written down: later commands read it."""

from __future__ import annotations

import json

import torch
import yaml
from tiny_runs import dskd_fork, write_config

from dskd_lightning.launch.trained import load_trained
from dskd_lightning.models.output import decoder_layers


def test_later_commands_keep_the_layers_that_training_chose(model_folder, tmp_path) -> None:
    changes = {"model.student.prune": {"layers": 2}, "data.test_split": 4}
    config = write_config(tmp_path, model_folder(layers=4), model_folder(hidden=24, seed=2), **changes)
    run = tmp_path / "run"
    dskd_fork("fit", "--config", str(config), "--output", str(run), "--trainer.max_epochs", "1")
    written = yaml.safe_load((run / "config.yaml").read_text())["model"]["student"]["prune"]["layers"]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert written == saved["student_spec"]["prune"]["layers"]
    assert len(written) == 2
    student, _ = load_trained(run, "last")
    assert len(decoder_layers(student)) == 2
    dskd_fork("test", "--config", str(run / "config.yaml"), "--data.train", "null", "--data.test_split", "0",
         "--data.test", str(tmp_path / "data.jsonl"))  # fmt: skip
    assert json.loads((run / "metrics.json").read_text())["nll_per_token"] > 0
