"""Two processes that shard student and teacher train, save and resume as one process does."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fsdp_state
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
from forked_ranks import dskd_ranks
from forked_runs import dskd_forked
from tiny_runs import write_config

from dskd_lightning.errors import UserError
from dskd_lightning.strategies.layers import decoder_layers

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "strategy"
SHARDED = ("--config", str(CONFIGS / "fsdp2.yaml"))


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


def losses(run: Path) -> list[float]:
    return column(run, "train/loss")


def norms(run: Path) -> list[float]:
    return column(run, "monitor/gradient_norm_student") + column(run, "monitor/gradient_norm_projectors")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def with_older_hooks(rank: int) -> None:
    """FSDP2 finds no tensors in dataclasses, as in PyTorch 2.6."""

    def collect(structure: Any) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in tree_leaves(structure) if torch.is_tensor(t) and t.requires_grad)

    def replace(structure: Any, tensors: Iterator[torch.Tensor]) -> Any:
        return tree_map(lambda t: next(tensors) if torch.is_tensor(t) and t.requires_grad else t, structure)

    for module in (_fsdp_state, _fsdp_param_group):
        for name, own in (("collect_grad_tensors", collect), ("replace_grad_tensors", replace)):
            if hasattr(module, name):
                setattr(module, name, own)


@pytest.mark.parametrize(
    ("lora", "ranks", "replicas"), [(None, 4, 2), ({"rank": 4}, 2, 1)], ids=["copies", "lora"]
)
def test_sharded_processes_train_as_one(model_folder, tmp_path, lora, ranks, replicas):
    changes = {
        "data.batch_size": 3,
        "trainer.devices": ranks,
        "trainer.gradient_clip_val": 0.5,
        "model.lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.ConstantLR",
            "init_args": {"factor": 1.0},
        },
        "model.student.lora": lora,
        "completions.prompts": 0,
    }
    teacher = model_folder(hidden=24, seed=2)
    config = write_config(tmp_path, model_folder(seed=1), teacher, **changes)
    fit = ("fit", "--config", str(config))
    many = (*fit, *SHARDED, "--trainer.strategy.replicas", str(replicas), "--trainer.devices", str(ranks))
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    whole = ("--trainer.devices", "1", "--data.batch_size", str(3 * ranks))
    assert dskd_forked(*fit, *whole, "--output", str(one), log=tmp_path / "one.log") == 0
    hooks = with_older_hooks if lora else lambda rank: None
    dskd_ranks(*many, "--output", str(two), folder=tmp_path, ranks=ranks, prepare=hooks)
    assert len(losses(one)) == len(losses(two)) > 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert norms(two) == pytest.approx(norms(one), rel=1e-3)
    expected, actual = weights(one), weights(two)
    assert expected.keys() == actual.keys()
    assert not any(name.startswith("teachers.") for name in actual)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4)

    if ranks > 2:
        return
    again = (*many, "--output", str(resumed))
    dskd_ranks(*again, "--trainer.max_epochs", "1", folder=tmp_path, ranks=ranks)
    dskd_ranks(*again, "--ckpt_path", "last", folder=tmp_path, ranks=ranks)
    assert losses(resumed) == pytest.approx(losses(two), rel=1e-5)


def test_sharded_students_learn_from_their_own_samples(model_folder, tmp_path):
    changes = {
        "data.batch_size": 3,
        "trainer.devices": 2,
        "model.on_policy": {"fraction": 0.7, "buffer_steps": 2, "max_new_tokens": 12},
        "samples.prompts": 3,
        "completions.prompts": 0,
    }
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **changes)
    fit = ("fit", "--config", str(config))
    dskd_ranks(*fit, "--trainer.strategy", "ddp", "--output", str(tmp_path / "whole"), folder=tmp_path)
    sharded = (*SHARDED, "--trainer.devices", "2", "--output", str(tmp_path / "sharded"))
    dskd_ranks(*fit, *sharded, folder=tmp_path)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trainer.strategy", "deepspeed_stage_3"], "take dskd_lightning.strategies.DSKDModelParallel"),
        (["--trainer.strategy", "fsdp"], "fsdp shards models in a way"),
        (["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"], "or ddp"),
        ([*SHARDED, "--trainer.strategy.replicas", "4"], "2 devices can't hold replicas=4"),
        (
            [*SHARDED, "--trainer.strategy.tensor_parallel_size", "2"],
            "tensor_parallel_size=2 isn't",
        ),
        ([*SHARDED, "--model.teacher.quantization", "4bit"], "4bit weights can't be sharded"),
        ([*SHARDED, "--model.teacher.offload", "true"], "host's memory can't be sharded"),
        ([*SHARDED, "--model.teacher.follow.decay", "0.9"], "can't follow the student's"),
        ([*SHARDED, f"--trainer.callbacks+={json.dumps(EMA)}"], "EMAWeightAveraging copies the module"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_it_starts(model_folder, tmp_path, arguments, sentence):
    from dskd_lightning.launch.lightning_cli import DistillationCLI

    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2))
    with pytest.raises(UserError, match=sentence):
        DistillationCLI(args=["--config", str(config), *arguments, "--trainer.devices", "2"], run=False)


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
    arguments = ("--config", str(config), "--config", str(path), "--print_config")
    assert dskd_forked("fit", *arguments, log=tmp_path / "printed") == 0
    printed = (tmp_path / "printed").read_text()
    strategy = yaml.safe_load(path.read_text())["trainer"]["strategy"]
    actual = yaml.safe_load(printed)["trainer"]["strategy"]
    wanted = strategy if isinstance(strategy, str) else strategy["class_path"]
    assert (actual if isinstance(actual, str) else actual["class_path"]) == wanted
