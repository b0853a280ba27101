"""What the best checkpoint is chosen by, and responses generated in validation."""

from __future__ import annotations

import statistics
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rouge_score.rouge_scorer import RougeScorer
from test_distillation_module import fit, make

import dskd_lightning as dl
from dskd_lightning.callbacks import (
    BestCheckpoint,
    CompletionsTable,
    SampleFidelity,
    ValidationResponses,
    validation_responses,
)
from dskd_lightning.callbacks.prompts import prompt_records
from dskd_lightning.runs.validation_metrics import direction


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val/nll_per_token", "min"),
        ("val/kl", "min"),
        ("val/aligned_reverse_kl", "min"),
        ("val/rougeL", "max"),
        ("val/accuracy", "max"),
        ("val/samples_agreement", "max"),
        ("val/samples_teacher_nll_per_byte", "min"),
    ],
)
def test_which_is_better_is_known(metric, mode):
    assert direction(metric) == mode
    with pytest.raises(dl.UserError, match=r"best\.mode"):
        direction(metric, {"min": "max", "max": "min"}[mode])


def test_others_metrics_need_a_mode():
    assert direction("val/mine", "max") == "max"
    with pytest.raises(dl.UserError, match=r"mean val/rougeL\?.*val/nll_per_token, .*val/samples_kl"):
        direction("val/rougel")


@pytest.mark.parametrize("seeds", [(), (10, 20)])
def test_responses_are_scored_as_one_by_one(model_folder, tmp_path, seeds):
    module, data = make(model_folder, tmp_path)
    callback = ValidationResponses(prompts=3, seeds=seeds, max_new_tokens=8, batch_size=2)
    trainer = fit(module, data, limit_train_batches=2, limit_val_batches=1, callbacks=[callback])
    scorer, scores = RougeScorer(["rougeL"], use_stemmer=True), []
    for seed in seeds or (None,):
        found = []
        for index in range(3):
            example = data.examples("val")[index]
            generator = dl.Generator(module.student, module.tokenizer, callback.settings)
            (answer,) = generator.answers([data.generation_prompt(example)], seed=seed, indices=[index])
            found.append(100 * scorer.score_multi(list(example.references), answer.text)["rougeL"].fmeasure)
        scores.append(statistics.fmean(found))
    values = trainer.callback_metrics
    assert float(values["val/rougeL"]) == pytest.approx(statistics.fmean(scores), rel=1e-5)
    assert 0 < float(values["val/response_tokens"]) <= 8
    if seeds:
        assert float(values["val/rougeL_std"]) == pytest.approx(statistics.stdev(scores), rel=1e-5, abs=1e-6)


def test_scores_are_percents_of_overlap(model_folder, tmp_path, monkeypatch):
    module, data = make(model_folder, tmp_path)
    callback = ValidationResponses(prompts=3, seeds=(7,), max_new_tokens=12, batch_size=1)
    module.configure_model()
    data.setup("validate")
    records = prompt_records(data, "val", 3, max_length=512)
    generator = dl.Generator(module.student, module.tokenizer, callback.settings)
    said = [a.text for a in generator.answers([r.ids for r in records], seed=7, indices=[0, 1, 2])]
    known = [replace(r, references=(f"{text} word",)) for r, text in zip(records, said, strict=True)]
    known[1] = replace(known[1], references=(said[1],))
    monkeypatch.setattr(validation_responses, "prompt_records", lambda *_, **__: known)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback])
    (values,) = trainer.validate(module, datamodule=data, verbose=False)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score(r.references[0], text)["rougeL"].fmeasure for r, text in zip(known, said, strict=True)
    ]
    assert scores[0] > 0
    assert values["val/rougeL"] == pytest.approx(100 * statistics.fmean(scores), rel=1e-5)
    assert values["val/exact_match"] == pytest.approx(100 / 3)


class Told(L.Callback):
    """Logs what it is told as ROUGE-L."""

    def __init__(self, *values):
        self.values = list(values)

    def validation_metrics(self, module):
        return ("rougeL",)

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.log("val/rougeL", torch.tensor(self.values.pop(0)))


def test_the_best_is_the_highest_where_higher_is_better(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    best = BestCheckpoint(tmp_path / "kept", "val/rougeL")
    L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3,
        limit_train_batches=2, limit_val_batches=1, callbacks=[best, Told(20.0, 30.0, 10.0)],
    ).fit(module, datamodule=data)  # fmt: skip
    checkpoint = torch.load(tmp_path / "kept" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert float(best.best_model_score) == 30


@pytest.mark.parametrize("monitor", ["val/rougeL", "val/kl"])
def test_a_checkpoint_callback_of_the_user_s_own_stands_beside_the_best(model_folder, tmp_path, monitor):
    measured = [ValidationResponses(prompts=2, max_new_tokens=4)] if monitor == "val/rougeL" else []
    kept = {}
    for run in ("alone", "beside"):
        torch.manual_seed(3)
        module, data = make(model_folder, tmp_path)
        best = BestCheckpoint(tmp_path / run, monitor)
        own = ModelCheckpoint(tmp_path / "own", "{step}", monitor="val/accuracy", mode="max", save_top_k=-1)
        added = [own] if run == "beside" else []
        L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            max_epochs=2, limit_train_batches=2, limit_val_batches=1, callbacks=[*added, *measured, best],
        ).fit(module, datamodule=data)  # fmt: skip
        checkpoint = torch.load(tmp_path / run / "best.ckpt", weights_only=True)
        kept[run] = checkpoint["global_step"], float(best.best_model_score)
        assert [path.name for path in (tmp_path / run).iterdir()] == ["best.ckpt"]
    assert kept["alone"] == kept["beside"]
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["step=2.ckpt", "step=4.ckpt"]


def test_what_others_promised_and_did_not_log_is_one_sentence(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    best = BestCheckpoint(tmp_path / "kept", "val/mine", "max")
    with pytest.raises(
        dl.UserError, match=r"logged no val/mine but val/accuracy, .*val/perplexity_per_token"
    ):
        L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            max_epochs=1, limit_train_batches=1, limit_val_batches=1, callbacks=[best],
        ).fit(module, datamodule=data)  # fmt: skip


@pytest.mark.parametrize(
    ("monitor", "callbacks", "changes", "words"),
    [
        ("val/rougeL", [ValidationResponses(), CompletionsTable()], {}, "set validation.prompts"),
        ("val/samples_kl", [SampleFidelity("x", prompts=0)], {}, "set samples.prompts"),
        ("val/aligned_kl", [], {}, r"but val/accuracy, val/agreement, val/kl, .*: name one of these"),
        ("val/kl", [], {"val_split": 0}, "set data.val or data.val_split"),
        ("val/kl", [], {"limit_val_batches": 0}, "limit_val_batches above 0"),
    ],
)
def test_what_is_not_measured_is_refused_before_training(
    model_folder, tmp_path, monitor, callbacks, changes, words
):
    module, data = make(model_folder, tmp_path)
    if "val_split" in changes:
        data.splits["val"] = changes.pop("val_split")
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        callbacks=[*callbacks, BestCheckpoint(tmp_path / "kept", monitor)], **changes,
    )  # fmt: skip
    with pytest.raises(dl.UserError, match=words):
        trainer.fit(module, datamodule=data)
    assert module.student is None  # not even loaded
    assert not (tmp_path / "kept").exists()


def test_validation_needs_the_data_modules_prompts(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    data.setup("fit")
    loader = list(data.val_dataloader())
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[ValidationResponses(1)]
    )
    with pytest.raises(dl.UserError, match="are read from an InstructionDataModule"):
        trainer.validate(module, torch.utils.data.DataLoader(loader, batch_size=None), verbose=False)
    with pytest.raises(dl.UserError, match=r"validation\.prompts"):
        ValidationResponses(-1)
