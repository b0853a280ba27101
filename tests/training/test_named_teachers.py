"""Records that name their teacher: batches of one teacher, its loss alone, and no other one runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from forked_ranks import dskd_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_runs import write_config
from transformers import AutoModelForCausalLM

import dskd_lightning as dl
from dskd_lightning.data.batching import BatchSettings, plan_batches
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.samples import BatchOfSamples
from dskd_lightning.generation.samples import Sample
from dskd_lightning.models import decoder_hidden, language_head
from dskd_lightning.models.loading import load_teacher
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.objectives import ALMObjective, DSKDObjective, LogitKDObjective
from dskd_lightning.teacher_cache import TeacherCacheSettings

NAMES = ("maths", "words", "")


def write_records(path: Path, count: int = 24, **named) -> Path:
    lines = [
        {
            "prompt": f"Say {i}.",
            "response": " ".join(f"number {i}" for _ in range(1 + i % 5)),
            **({"teacher": NAMES[i % 3]} if NAMES[i % 3] else {}),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line | named) + "\n" for line in lines))
    return path


def specs(model_folder, tokenizer="sentencepiece"):
    student = dl.StudentSpec(model_folder(seed=1))
    first = dl.TeacherSpec(model_folder(hidden=24, seed=2), name="maths", weight=3.0)
    second = dl.TeacherSpec(model_folder(hidden=24, seed=3, tokenizer=tokenizer), name="words")
    return student, first, second


def make(model_folder, tmp_path, objectives=None, tokenizer="sentencepiece", **options):
    student, first, second = specs(model_folder, tokenizer)
    torch.manual_seed(0)
    module = dl.DistillationModule(
        student, objectives or [LogitKDObjective(), ALMObjective()], [first, second],
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )  # fmt: skip
    defaults = {
        "batch_size": 3,
        "max_length": 96,
        "max_prompt_length": 40,
    }
    data = dl.InstructionDataModule(
        str(write_records(tmp_path / "data.jsonl")), student=student, teacher=[first, second],
        cache_dir=str(tmp_path / "cache"), **{**defaults, **options},
    )  # fmt: skip
    return module, data


def batches_of(data):
    data.setup("fit")
    return list(data.train_dataloader())


def test_batches_have_one_teacher_and_all_records_come_once(model_folder, tmp_path) -> None:
    _, data = make(model_folder, tmp_path)
    batches = batches_of(data)
    seen = Counter(index for batch in batches for index in batch.examples.tolist())
    assert seen == Counter(range(24))
    for batch in batches:
        names = {data.examples("train").row(index).teacher for index in batch.examples.tolist()}
        expected = {"maths": 0, "words": 1, "": None}[names.pop()]
        assert not names
        assert batch.teacher == expected
        for index, tokens in enumerate(batch.teachers):
            assert (len(tokens.response) > 0) == batch.answers(index)
    assert {batch.teacher for batch in batches} == {0, 1, None}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    seed=st.integers(0, 99),
    packing=st.booleans(),
    budget=st.booleans(),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_groups_never_meet_and_epochs_are_alike(lengths, seed, packing, budget, shuffle, data) -> None:
    groups = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=len(lengths), max_size=len(lengths))))
    sizes = BatchSettings(4, 64 if budget else None, packing, 32)
    plans = [
        plan_batches(np.array(lengths), sizes, seed=seed, epoch=epoch, shuffle=shuffle, groups=groups)
        for epoch in (0, 1)
    ]
    assert len(plans[0]) == len(plans[1])
    for plan in plans:
        assert sorted(i for batch in plan for row in batch for i in row) == list(range(len(lengths)))
        assert all(len({groups[i] for row in batch for i in row}) == 1 for batch in plan)
    again = plan_batches(np.array(lengths), sizes, seed=seed, shuffle=shuffle, groups=groups)
    assert again == plans[0]


def test_places_of_a_mixture_keep_their_teacher(model_folder, tmp_path) -> None:
    _, data = make(model_folder, tmp_path, weights={str(tmp_path / "data.jsonl"): 0.5})
    data.setup("fit")
    loader, seen = data.train_dataloader(), Counter()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for batch in loader:
            rows = batch.examples.tolist()
            seen.update(rows)
            assert len({data.examples("train").row(row).teacher for row in rows}) == 1
    assert seen == Counter(range(24))


class Calls:
    """How often each teacher's decoder ran."""

    def __init__(self, module) -> None:
        self.counts = [0] * len(module.teachers)
        for index, teacher in enumerate(module.teachers):
            teacher.model.register_forward_hook(lambda *_, index=index: self._count(index))

    def _count(self, index: int) -> None:
        self.counts[index] += 1


@pytest.mark.parametrize("dual_space", [False, True])
def test_the_loss_is_that_teachers_alone_and_the_other_is_silent(model_folder, tmp_path, dual_space) -> None:
    if dual_space:
        module, data = make(model_folder, tmp_path, [DSKDObjective(), DSKDObjective()], "bpe")
    else:
        module, data = make(model_folder, tmp_path)
    module.configure_model()
    calls = Calls(module)
    for batch in batches_of(data):
        calls.counts[:] = [0, 0]
        output = module.distil(batch)
        assert calls.counts == [int(batch.answers(0)), int(batch.answers(1))]
        sides = [
            module.teacher_side(index, batch.teachers[index]) if batch.answers(index) else None
            for index in (0, 1)
        ]
        student = module.student_side(batch.student)
        alone = [
            None if side is None else module.objectives[index](student, side, batch.alignments[index])
            for index, side in enumerate(sides)
        ]
        if batch.teacher is None:
            expected = (3 * alone[0].loss + alone[1].loss) / 4
        else:
            expected = alone[batch.teacher].loss
        torch.testing.assert_close(output.loss, expected)
        assert int(output.tokens) == len(student)
        output.loss.backward()  # of all parameters, as ranks that wait for each other need
        assert all(p.grad is not None for p in module.objectives.parameters() if p.requires_grad)


def test_samples_keep_their_teacher(model_folder, tmp_path) -> None:
    module, data = make(model_folder, tmp_path)
    module.configure_model()
    renderers = [ChatRenderer.from_spec(load_tokenizer(spec), spec) for spec in module.teacher_specs]
    substitute = BatchOfSamples(module.tokenizer, renderers)
    for batch in batches_of(data):
        made = substitute(batch, [[Sample((40, 41), None)]] * len(batch))
        assert made.teacher == batch.teacher
        output = module.distil(made)
        assert torch.isfinite(output.loss)
        read = [int(output.metrics[f"teacher_nll_per_byte_{index}"].count) > 0 for index in (0, 1)]
        assert read == [batch.answers(0), batch.answers(1)]


def fit(module, data, **options):
    L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_epochs=2, **options,
    ).fit(module, datamodule=data)  # fmt: skip
    return torch.cat([p.detach().flatten() for p in module.student.parameters()])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_cached_states_train_alike_and_hold_no_others_records(model_folder, tmp_path, accumulate) -> None:
    module, data = make(model_folder, tmp_path, val_split=6)
    running = fit(module, data, accumulate_grad_batches=accumulate)
    cache = TeacherCacheSettings(dtype="float32")
    module, data = make(model_folder, tmp_path, val_split=6, teacher_cache=cache)
    cached = fit(module, data, accumulate_grad_batches=accumulate)
    torch.testing.assert_close(cached, running, rtol=1e-4, atol=1e-5)
    for index, store in enumerate(data.teacher_hidden["train"]):
        for row in range(24):
            answers = data.examples("train").row(row).teacher in ("", NAMES[index])
            assert (len(store.get([row])[0]) > 0) == answers


def test_two_ranks_train_as_one_process_does(model_folder, tmp_path) -> None:
    student, first, second = specs(model_folder, "bpe")
    teachers = [{"source": spec.source, "name": spec.name} for spec in (first, second)]
    objective = {"class_path": "dskd_lightning.objectives.DSKDObjective"}
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        config = write_config(
            folder, student.source, None,
            **{
                "model.teacher": teachers, "model.objective": [objective, objective],
                "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
                "data.train": str(write_records(folder / "named.jsonl", 22)),
                "data.batch_size": 3, "data.val_split": 0, "data.test_split": 0, "trainer.max_epochs": 1,
                "trainer.devices": ranks, "trainer.accumulate_grad_batches": 3 - ranks,
                "trainer.strategy": "ddp" if ranks > 1 else "auto",
            },
        )  # fmt: skip
        dskd_ranks("fit", "--config", str(config), folder=folder, ranks=ranks, timeout=120)
        path = max((folder / "run").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        found.append(torch.load(path, weights_only=True))
    assert found[0]["global_step"] == found[1]["global_step"] > 3
    torch.testing.assert_close(found[0]["state_dict"], found[1]["state_dict"], rtol=1e-4, atol=1e-5)


def test_mistakes_are_one_sentence(model_folder, tmp_path) -> None:
    student, first, second = specs(model_folder)
    file = write_records(tmp_path / "unknown.jsonl", teacher="music")
    data = dl.InstructionDataModule(
        str(file), student=student, teacher=[first, second], cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(dl.UserError, match=r"unknown.jsonl:1 names the teacher 'music'.*maths, words"):
        data.setup("fit")
    twice = dl.TeacherSpec(second.source, name="maths")
    with pytest.raises(dl.UserError, match="'maths' belongs to several"):
        dl.InstructionDataModule(str(file), student=student, teacher=[first, twice])
    collator = dl.DistillationCollator(student, [first, second])
    rows = [json.loads(line) for line in write_records(tmp_path / "rows.jsonl").read_text().splitlines()]
    with pytest.raises(dl.UserError, match="name different teachers"):
        collator(rows)
    assert collator(rows[1::3]).teacher == 1
    unnamed = dl.InstructionDataModule(
        str(file), student=student, teacher=dl.TeacherSpec(first.source), cache_dir=str(tmp_path / "cache")
    )
    unnamed.setup("fit")
    assert unnamed.report["train"][f"unused field 'teacher' of {file}"] == 24


@pytest.mark.parametrize("cached", [False, True])
def test_each_has_its_own_adapter_and_quantisation(model_folder, tmp_path, cached) -> None:
    """The states that train are those of each teacher as it is loaded alone."""
    pytest.importorskip("bitsandbytes")
    student, first, second = specs(model_folder)
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(first.source),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    first = replace(first, adapter=str(tmp_path / "adapter"))
    second = replace(second, quantization="8bit", dtype="bfloat16")
    module = dl.DistillationModule(student, [LogitKDObjective(), ALMObjective()], [first, second])
    data = dl.InstructionDataModule(
        str(write_records(tmp_path / "data.jsonl")), student=student, teacher=[first, second], batch_size=3,
        max_length=96, max_prompt_length=40, cache_dir=str(tmp_path / "cache"),
        teacher_cache=TeacherCacheSettings(dtype="float32") if cached else None,
    )  # fmt: skip
    fit(module, data)
    alone = [adapted.merge_and_unload().eval(), load_teacher(second)]
    for batch in data.train_dataloader():
        for index, teacher in enumerate(alone):
            if batch.answers(index):
                tokens = batch.teachers[index]
                hidden = batch.teacher_hidden[index] if cached else None
                found = module.teacher_side(index, tokens, hidden)
                wanted = tokens.select(decoder_hidden(teacher, tokens))
                torch.testing.assert_close(found.hidden.float(), wanted.float(), rtol=2e-2, atol=2e-2)
                logits = found.head.logits(found.hidden).float()
                expected = language_head(teacher).logits(wanted).float()
                torch.testing.assert_close(logits, expected, rtol=5e-2, atol=5e-2)
