"""Every shipped YAML is read as a user would, and the papers' pairs train on tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer
from tiny_runs import write_data
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dskd_lightning.launch.lightning_cli import DistillationCLI

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "LightningCLI's args parameter",
        "Found .* in eval mode",
        ".*gradient_checkpointing_enable",
    )
]
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
PAIRS = {
    "mistral_to_tinyllama": ("mistral", "llama"),
    "qwen1.5_to_gpt2": ("qwen2", "gpt2"),
    "qwen2.5_to_gpt2": ("qwen2", "gpt2"),
    "qwen3_to_llama3.2": ("qwen3", "llama"),
}
OWN_DATA = ("demo_to_gpt2", "qwen2.5_coder_to_smollm2")
"""Pairs whose models or data a reader brings himself: read here, trained elsewhere."""
OWN = sorted(
    path for pair in OWN_DATA for path in (CONFIGS / pair).glob("*.yaml") if ".study" not in path.name
)
FRAGMENTS = sorted(
    path
    for folder in ("objective", "on_policy", "precision", "strategy", "logger", "teacher", "validation")
    for path in (CONFIGS / folder).glob("*.yaml")
)
ON_POLICY = [path for path in FRAGMENTS if path.parent.name == "on_policy"]
METHODS = sorted(path for pair in PAIRS for path in (CONFIGS / pair).glob("*.yaml") if path.stem != "base")
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.endswith(".study.yaml"))
STUDIES = sorted(CONFIGS.rglob("*.study.yaml"))

_SIZES = {
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
_GPT2 = {
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
FAMILIES: dict[str, tuple[Callable[[int], PreTrainedConfig], str, int, bool]] = {
    "gpt2": (lambda v: GPT2Config(vocab_size=v, n_embd=16, **_GPT2), "bpe", 330, False),
    "llama": (lambda v: LlamaConfig(vocab_size=v, hidden_size=16, **_SIZES), "sentencepiece", 400, True),
    "mistral": (lambda v: MistralConfig(vocab_size=v, hidden_size=24, **_SIZES), "sentencepiece", 380, True),
    "qwen2": (lambda v: Qwen2Config(vocab_size=v, hidden_size=24, **_SIZES), "bpe", 420, False),
    "qwen3": (
        lambda v: Qwen3Config(vocab_size=v, hidden_size=24, head_dim=8, **_SIZES),
        "bpe",
        420,
        False,
    ),
}


class ParsedCLI(DistillationCLI):
    """Reads and checks all settings; builds nothing."""

    def instantiate_classes(self) -> None: ...


def config_arguments(*files: Path) -> list[str]:
    return [word for file in files for word in ("--config", str(file))]


def layers(path: Path) -> list[Path]:
    """The files that a config's header says to combine."""
    if path.parent.name in (*PAIRS, *OWN_DATA):
        base = path.parent / "base.yaml"
        return [base] if path == base else [base, path]
    return [QUICKSTART] if path == QUICKSTART else [QUICKSTART, path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Callable[[str], str]:
    """``tiny(family)`` -> a saved model of that family with a tokenizer of its kind."""
    made: dict[str, str] = {}

    def make(family: str) -> str:
        if family not in made:
            config, kind, vocabulary, bos = FAMILIES[family]
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(family)
            tokenizer = make_tokenizer(kind, vocabulary, add_bos=bos)
            tokenizer.save_pretrained(folder)
            # Qwen's heads are larger than its vocabulary, and its tokenizer class adds a token.
            AutoModelForCausalLM.from_config(config(len(tokenizer) + 8)).save_pretrained(folder)
            made[family] = str(folder)
        return made[family]

    return make


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> str:
    return str(write_data(tmp_path_factory.mktemp("data") / "train.jsonl", count=8))


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_reads_as_its_header_says(path) -> None:
    """What a file says is what the run would use: no key of it is unknown, ignored or overridden."""
    cli = ParsedCLI(args=config_arguments(*layers(path)), run=False)
    said = yaml.safe_load(path.read_text())
    assert said
    missing = [key for key, value in _leaves(said) if _get(cli.config.as_dict(), key) != value]
    assert not missing


def _leaves(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Plain values of nested dicts; lists of classes are left to the parser."""
    leaves = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, (*prefix, key))
        elif not isinstance(value, (dict, list)):
            leaves.append(((*prefix, key), value))
    return leaves


def _get(values: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        values = values[part] if isinstance(values, dict) else getattr(values, part)
    return values


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_header_tells_how_to_run_it(path) -> None:
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert header.startswith("# ")
    assert "dskd fit --config" in header
    named = name_of(path) if path.stem != "base" else path.parent.name + "/base.yaml"
    assert f"configs/{named}" in header


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_study_reads_and_its_variants_parse(path, tmp_path) -> None:
    from dskd_lightning.study import Study

    study = Study.read(path)
    for variant in study.variants:
        overlay = tmp_path / "variant.yaml"
        overlay.write_text(yaml.safe_dump(variant.config))
        files = [*study.base, *map(Path, variant.configs), overlay]
        point = variant.points()[-1]
        options = [f"--{key}={value}" for key, value in point.items()]
        cli = ParsedCLI(args=[*config_arguments(*files), *options], run=False)
        for key, value in point.items():
            assert _get(cli.config.as_dict(), tuple(key.split("."))) == value


def test_every_folder_is_covered() -> None:
    assert {path.parent.name for path in SHIPPED} == {
        "configs", "objective", "on_policy", "precision", "strategy", "logger", "teacher", "validation",
        *OWN_DATA, *PAIRS,
    }  # fmt: skip
    assert len(FRAGMENTS) + len(METHODS) + len(PAIRS) + len(OWN) + 1 == len(SHIPPED)


def train(files: list[Path], output: Path, data: str, student: str, teacher: str | None) -> DistillationCLI:
    """One optimiser step of a shipped config with its models and data exchanged."""
    changes: dict[str, Any] = {
        "output": output,
        "model.student.source": student,
        "data.train": data,
        "data.test": data,
        "data.val_split": 2,
        "data.format": "auto",
        "data.max_length": 64,
        "data.max_prompt_length": 40,
        "data.batch_size": 4,
        "data.cache_dir": output / "cache",
        "data.teacher_cache": "null",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.logger": "false",
        "trainer.accumulate_grad_batches": 1,
        "trainer.limit_val_batches": 1,
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": output,
    }
    if teacher is not None:
        changes["model.teacher.source"] = teacher
    arguments = [f"--{key}={value}" for key, value in changes.items()]
    cli = DistillationCLI(args=[*config_arguments(*files), *arguments], run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_pair_trains_on_tiny_models_of_its_families(path, tiny, data_file, tmp_path) -> None:
    teacher, student = (tiny(family) for family in PAIRS[path.parent.name])
    files = layers(path)
    if path.stem == "teacher":
        cli = train(files, tmp_path, data_file, teacher, None)
        assert not cli.model.teachers
    else:
        if _names_adapter(files):
            files = [files[0], _without_adapter(files[0], tmp_path), *files[1:]]
        cli = train(files, tmp_path, data_file, student, teacher)
        assert len(cli.model.teachers) == 1
    assert cli.trainer.global_step == 1
    assert math.isfinite(float(cli.trainer.callback_metrics["train/loss"]))
    said = yaml.safe_load(path.read_text())["model"]["objective"]["class_path"]
    assert type(cli.model.objectives[0]).__name__ == said.rsplit(".", 1)[1]


def _names_adapter(files: list[Path]) -> bool:
    return "adapter" in (yaml.safe_load(files[0].read_text())["model"]["teacher"] or {})


def _without_adapter(base: Path, folder: Path) -> Path:
    """The adapter is a product of the pair's own teacher run."""
    path = folder / "without_adapter.yaml"
    path.write_text(yaml.safe_dump({"model": {"teacher": {"adapter": None}}}))
    return path


@pytest.mark.parametrize("path", ON_POLICY, ids=name_of)
def test_on_policy_trains_on_samples(path, tiny, data_file, tmp_path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"model": {"student": {"source": ""}, "teacher": {"source": ""}}}))
    always = tmp_path / "always.yaml"
    always.write_text(yaml.safe_dump({"model": {"on_policy": {"fraction": 1, "max_new_tokens": 4}}}))
    teacher = "llama" if path.stem == "cross_tokenizer" else "qwen2"
    cli = train([base, path, always], tmp_path, data_file, tiny("qwen2"), tiny(teacher))
    assert cli.trainer.global_step == 1
    assert math.isfinite(float(cli.trainer.callback_metrics["train/loss"]))
    assert float(cli.trainer.callback_metrics["train/samples_length"]) > 0


@pytest.mark.parametrize("name", ["context_distillation", "self_distillation"])
def test_teachers_with_a_prompt_of_their_own_train(name, tiny, tmp_path) -> None:
    lines = [
        {
            "prompt": f"Say {i}.",
            "response": f"number {i}",
            "teacher_messages": [{"role": "user", "content": f"Say {i}, which is the number {i}."}],
        }
        for i in range(8)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"model": {"student": {"source": ""}, "teacher": {"source": ""}}}))
    objective = CONFIGS / "objective" / "logit_kd.yaml"
    files = [base, objective, CONFIGS / "teacher" / f"{name}.yaml"]
    cli = train(files, tmp_path, str(data), tiny("qwen2"), tiny("qwen2"))
    assert cli.trainer.global_step == 1
    assert math.isfinite(float(cli.trainer.callback_metrics["train/loss"]))
    batch = next(iter(cli.datamodule.train_dataloader()))
    assert batch.teachers[0].input_ids.shape[1] > batch.student.input_ids.shape[1]


@pytest.mark.parametrize("pair", PAIRS)
def test_papers_hyperparameters(pair) -> None:
    """The values that issue and papers fix, read back from the parsed configs."""
    folder = CONFIGS / pair
    method = next(path for path in (folder / "dskd_cma.yaml", folder / "dskd_eta.yaml") if path.is_file())
    config = ParsedCLI(args=config_arguments(folder / "base.yaml", method), run=False).config
    objective = config.model.objective.init_args
    assert (objective.kd_ratio, objective.temperature) == (0.5, 2.0)
    assert (config.data.max_length, config.data.max_prompt_length) == (512, 256)
    assert config.data.batch_size * config.trainer.accumulate_grad_batches == 32
    assert config.model.projector_lr == 1e-3
    lora = config.model.student.lora
    if pair.endswith("gpt2"):
        assert lora is None
        assert (config.model.optimizer.init_args.lr, config.trainer.max_epochs) == (5e-4, 20)
    else:
        assert (lora.rank, lora.alpha, lora.dropout) == (256, 8, 0.1)
    if pair == "mistral_to_tinyllama":
        assert (config.model.optimizer.init_args.lr, config.trainer.max_epochs) == (1e-3, 10)
