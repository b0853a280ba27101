"""`DistillationModule` as Lightning users know modules: whoever makes the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from forked_ranks import in_ranks
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from test_distillation_module import fit, make
from torch.utils.data import DataLoader

import dskd_lightning as dl
from dskd_lightning.callbacks import TrainingMonitor
from dskd_lightning.callbacks.completions import CompletionsTable
from dskd_lightning.callbacks.responses import ResponseEvaluation
from dskd_lightning.callbacks.validation_responses import ValidationResponses
from dskd_lightning.checkpoints import WholeCheckpointIO, digest_of
from dskd_lightning.generation.generator import Generator
from dskd_lightning.training.on_policy import OnPolicySettings

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def test_forward_gives_the_logits_of_the_response_positions(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    module.configure_model()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    tokens = batch.student
    whole = module.student(tokens.input_ids, attention_mask=tokens.attention_mask).logits.flatten(0, 1)
    torch.testing.assert_close(module(batch), whole[tokens.response], rtol=1e-4, atol=1e-5)
    output = dl.DistillationModule(module.student_spec, dl.SFTObjective())
    output.configure_model()
    output.student = module.student
    expected = torch.nn.functional.cross_entropy(module(batch), tokens.labels.flatten()[tokens.response])
    assert output.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("seed", [None, 10])
def test_predictions_come_back_in_the_order_of_the_rows(model_folder, tmp_path, seed):
    module, data = make(model_folder, tmp_path)
    module.generation = dl.GenerationSettings(max_new_tokens=5)
    module.generation_seed = seed
    data.setup("fit")
    rows = [{"prompt": "Say a long word and another one. " * n, "response": "yes"} for n in (1, 3, 2, 1, 4)]
    collator = dl.DistillationCollator(
        module.student_spec, module.teacher_specs, max_length=96, max_prompt_length=80
    )
    trainer = L.Trainer(**QUIET)
    loader = DataLoader(rows, batch_size=3, collate_fn=collator)
    found = trainer.predict(module, loader)
    assert [[answer.index for answer in batch] for batch in found] == [[0, 1, 2], [0, 1]]
    alone = trainer.predict(module, DataLoader(rows, batch_size=1, collate_fn=collator))
    if seed is None:  # greedy: a prompt's place in its batch is no part of its answer
        assert [b[0].text for b in alone] == [answer.text for batch in found for answer in batch]
    assert all(0 < answer.tokens <= 5 or answer.finished for batch in found for answer in batch)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_all_responses_are_written_in_the_trainers_precision(
    model_folder, tmp_path, monkeypatch, precision
) -> None:
    module, data = make(model_folder, tmp_path)
    data.sources["test"] = data.sources["train"]
    found: dict[str, set[bool]] = {}
    own = Generator._generate_once

    def asked(self: Generator, *given: object) -> object:
        found.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
        return own(self, *given)

    monkeypatch.setattr(Generator, "_generate_once", asked)
    options: dict[str, Any] = {"max_new_tokens": 3}
    callbacks = {
        "completions": CompletionsTable(prompts=1, **options),
        "validation": ValidationResponses(prompts=1, **options),
        "responses": ResponseEvaluation(tmp_path / "r", seeds=(), limit=1, efficiency=False, **options),
    }
    for name, callback in callbacks.items():
        trainer = L.Trainer(callbacks=[callback], max_steps=1, precision=precision, **QUIET)
        (trainer.test if name == "responses" else trainer.validate)(module, datamodule=data)
    assert found == {name: {precision == "bf16-mixed"} for name in callbacks}


def test_the_data_modules_prompts_are_answered(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    module.generation = dl.GenerationSettings(max_new_tokens=3)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two, which is longer"}\n{"prompt": "3"}\n')
    data.sources["predict"] = str(file)
    data.batch_size = 2
    answers = [answer for batch in L.Trainer(**QUIET).predict(module, datamodule=data) for answer in batch]
    assert sorted(answer.index for answer in answers) == [0, 1, 2]
    prompts = [data.generation_prompt(data.examples("predict")[answer.index]) for answer in answers]
    generator = dl.Generator(module.student, module.tokenizer, module.generation)
    assert [answer.ids for answer in answers] == [answer.ids for answer in generator.answers(prompts)]


def test_a_run_brings_what_it_needs(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    trainer = L.Trainer(
        **QUIET, max_steps=2, log_every_n_steps=1, limit_val_batches=0, default_root_dir=tmp_path / "run"
    )
    trainer.fit(module, datamodule=data)
    assert sum(isinstance(callback, TrainingMonitor) for callback in trainer.callbacks) == 1
    assert trainer.callback_metrics["monitor/tokens_per_second"] > 0
    assert isinstance(trainer.strategy.checkpoint_io, WholeCheckpointIO)
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    assert digest_of(path)
    module, data = make(model_folder, tmp_path)
    mine = TrainingMonitor(check_every=7)
    trainer = fit(module, data, max_steps=1, callbacks=[mine])
    assert [c for c in trainer.callbacks if isinstance(c, TrainingMonitor)] == [mine]


def test_a_tuner_finds_the_learning_rate(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    trainer = L.Trainer(
        **QUIET, max_steps=4, default_root_dir=tmp_path, enable_checkpointing=False, limit_val_batches=0
    )
    module.configure_model()
    before = {name: p.clone() for name, p in module.state_dict().items()}
    found = Tuner(trainer).lr_find(module, datamodule=data, num_training=20, early_stop_threshold=None)
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())
    assert module.lr == pytest.approx(found.suggestion())
    trainer.fit(module, datamodule=data)
    rates = {g["name"]: g["initial_lr"] for g in trainer.optimizers[0].param_groups}
    assert rates["student"] == pytest.approx(module.lr)
    assert rates["projector"] == module.projector_lr
    assert trainer.global_step == 4


def test_a_tuner_searches_on_the_student_s_own_samples(model_folder, tmp_path):
    spec = dl.StudentSpec(model_folder(seed=1))
    settings = OnPolicySettings(fraction=0.5, max_new_tokens=4, buffer_steps=2)
    module = dl.DistillationModule(spec, dl.LogitKDObjective(), spec, on_policy=settings)
    rows = [{"prompt": f"Say {n}.", "response": f"{n}"} for n in range(12)]
    data = dl.InstructionDataModule(rows, student=spec, teacher=spec, batch_size=2, cache_dir=str(tmp_path))
    trainer = L.Trainer(
        **QUIET, max_steps=3, default_root_dir=tmp_path, enable_checkpointing=False, limit_val_batches=0
    )
    Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, init_val=2)
    assert data.batch_size == 4
    found = Tuner(trainer).lr_find(module, datamodule=data, num_training=20, early_stop_threshold=None)
    assert found.suggestion()
    assert module.lr == found.suggestion()
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 3


def test_ranks_find_one_learning_rate(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    options = {**QUIET, "enable_checkpointing": False, "limit_val_batches": 0, "default_root_dir": tmp_path}

    def run(rank: int) -> None:
        trainer = L.Trainer(**options, max_steps=3, devices=2, strategy="ddp")
        Tuner(trainer).lr_find(module, datamodule=data, num_training=20, early_stop_threshold=None)
        (tmp_path / f"found {rank}").write_text(str(module.lr))
        with pytest.raises(ValueError, match="batch size is currently not supported with distributed"):
            Tuner(trainer).scale_batch_size(module, datamodule=data)

    in_ranks(run, folder=tmp_path / "logs")
    rates = [float((tmp_path / f"found {rank}").read_text()) for rank in (0, 1)]
    assert rates[0] == rates[1] != module.lr


def test_a_search_in_processes_of_the_trainer_s_own_is_refused(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    trainer = L.Trainer(**QUIET, max_steps=3, devices=2, strategy="ddp_fork", default_root_dir=tmp_path)
    with pytest.raises(Exception, match="UserError: A search inside of processes that the Trainer forks"):
        Tuner(trainer).lr_find(module, datamodule=data)


@pytest.mark.parametrize("finder", [LearningRateFinder(), BatchSizeFinder()])
def test_a_search_after_the_schedule_is_refused(model_folder, tmp_path, finder):
    module, data = make(model_folder, tmp_path)
    trainer = L.Trainer(**QUIET, max_steps=3, default_root_dir=tmp_path, callbacks=[finder])
    with pytest.raises(dl.UserError, match=r"Tuner\(trainer\)\.(lr_find|scale_batch_size)\("):
        trainer.fit(module, datamodule=data)
    assert module.student is None


def test_a_batch_size_that_means_nothing_is_not_searched(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    data.max_tokens_per_batch = 300
    trainer = L.Trainer(**QUIET, max_steps=3, default_root_dir=tmp_path)
    with pytest.raises(dl.UserError, match=r"data\.max_tokens_per_batch: 300"):
        Tuner(trainer).scale_batch_size(module, datamodule=data)


def test_rows_without_a_collator_are_one_sentence(model_folder, tmp_path):
    module, _ = make(model_folder, tmp_path)
    rows = [{"prompt": "Say yes.", "response": "yes"}] * 4
    trainer = L.Trainer(**QUIET, max_steps=1, enable_checkpointing=False)
    with pytest.raises(dl.UserError, match=r"of type dict: give it collate_fn=DistillationCollator"):
        trainer.fit(module, DataLoader(rows, batch_size=2))


def test_a_run_that_time_alone_ends_needs_a_schedule_without_end(model_folder, tmp_path):
    def run(**options):
        module, data = make(model_folder, tmp_path, **options)
        limits = {"max_epochs": -1, "max_time": {"seconds": 1}, "default_root_dir": tmp_path}
        trainer = L.Trainer(**{**QUIET, **limits})
        trainer.fit(module, datamodule=data)
        return trainer.global_step

    with pytest.raises(
        dl.UserError, match=r"set trainer\.max_epochs or trainer\.max_steps, or a model\.lr_sched"
    ):
        run()
    assert run(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)) > 0


class Weighted(dl.DistillationModule):
    """A subclass as Lightning users write them, which keeps all its arguments."""

    def __init__(self, student, objective, teacher=None, bonus=0.0, **options):
        super().__init__(student, objective, teacher, **options)
        self.save_hyperparameters()


class Own(dl.DistillationModule):
    """A subclass with a signature of its own."""

    def __init__(self, folder, width):
        super().__init__(dl.StudentSpec(folder), dl.SFTObjective(), projector_lr=0.5)
        self.save_hyperparameters()


def test_hyperparameters_are_lightnings(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path, min_lr_ratio=0.25)
    assert module.hparams.min_lr_ratio == 0.25
    assert module.hparams.student["init_args"]["source"] == model_folder(seed=1)
    logger = CSVLogger(tmp_path / "logs")
    trainer = L.Trainer(**{**QUIET, "logger": logger}, max_steps=1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    said = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert said["teacher"]["init_args"]["source"] == model_folder(hidden=24, seed=2)


@pytest.mark.filterwarnings("ignore:Attribute .objective. is an instance of")  # as its author means to
def test_subclasses_come_back_with_their_own_arguments(model_folder, tmp_path):
    made, data = make(model_folder, tmp_path)
    specs = (made.student_spec, dl.DSKDObjective(kd_ratio=0.3), made.teacher_specs[0])
    for module in (Weighted(*specs, bonus=0.5, warmup_ratio=0.2), Own(model_folder(seed=1), 3)):
        trainer = fit(module, data, max_steps=1)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        again = type(module).load_from_checkpoint(tmp_path / "a.ckpt")
        assert type(again) is type(module)
        for name, value in module.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        if isinstance(module, Weighted):
            assert (again.hparams.bonus, again.warmup_ratio, again.objectives[0].kd_ratio) == (0.5, 0.2, 0.3)
        else:
            assert (again.hparams.width, again.projector_lr) == (3, 0.5)


def test_a_tuner_finds_the_batch_size(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    trainer = L.Trainer(**QUIET, max_steps=3, default_root_dir=tmp_path, enable_checkpointing=False)
    Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=3, init_val=2)
    assert data.batch_size == 8
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 3
    assert len(next(iter(data.train_dataloader()))) == 8
