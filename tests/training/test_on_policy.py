"""Learning from the student's own samples: exact batches, one loss, the same samples however a run is cut."""

from __future__ import annotations

import csv
import math

import lightning as L
import numpy as np
import pytest
import torch
from forked_ranks import dskd_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from test_distillation_module import fit, make
from tiny_runs import dskd_fork, write_config, write_data

import dskd_lightning as dl
from dskd_lightning.alignment.sampled_text import sampled_text
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.samples import BatchOfSamples, prompts_of
from dskd_lightning.functional.divergences import JensenShannon
from dskd_lightning.generation.samples import GeneratorSampler, Sample, repetition, sample_key
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.training.on_policy import OnPolicySettings, SampleBuffer


def pair(model_folder, tokenizer="bpe"):
    student = dl.StudentSpec(model_folder(seed=1))
    return student, dl.TeacherSpec(model_folder(hidden=24, seed=2, tokenizer=tokenizer))


def collated(student, teacher, conversations):
    return dl.DistillationCollator(student, teacher, max_length=200, max_prompt_length=120)(
        [{"messages": messages} for messages in conversations]
    )


def chat(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


CONVERSATIONS = [
    chat("name three fruits", "apples, pears"),
    chat("hi", "hello", "and then?", "nothing more to say"),
    chat("日本語", "🙂 café"),
]


@pytest.mark.parametrize("tokenizer", ["bpe", "sentencepiece"])
def test_prompts_are_those_of_the_last_response(model_folder, tokenizer):
    student, teacher = pair(model_folder, tokenizer)
    batch = collated(student, teacher, CONVERSATIONS)
    for spec, tokens in ((student, batch.student), (teacher, batch.teachers[0])):
        renderer = ChatRenderer.from_spec(load_tokenizer(spec), spec)
        expected = [
            renderer.generation_prompt(tuple(dl_message(m) for m in messages[:-1]))
            for messages in CONVERSATIONS
        ]
        assert prompts_of(tokens) == expected


def dl_message(message):
    from dskd_lightning.data.examples import Message

    return Message(message["role"], message["content"])


def test_prompts_of_packed_rows(model_folder, tmp_path):
    student, teacher = pair(model_folder)
    options = {
        "student": student, "teacher": teacher, "max_length": 96, "max_prompt_length": 40, "batch_size": 3,
        "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    file = str(write_data(tmp_path / "data.jsonl"))
    packed, plain = (dl.InstructionDataModule(file, packing=packing, **options) for packing in (True, False))
    found = {}
    for data in (packed, plain):
        data.setup("fit")
        for batch in data.train_dataloader():
            for example, prompt in zip(batch.examples.tolist(), prompts_of(batch.student), strict=True):
                assert found.setdefault(example, prompt) == prompt
    assert len(found) == 24


@pytest.mark.parametrize("tokenizer", ["bpe", "sentencepiece", "wordpiece"])
def test_students_tokens_are_the_sampled_ids(model_folder, tokenizer):
    """Non-canonical ids, bytes of half characters, special tokens; ended, cut and empty samples."""
    student, teacher = pair(model_folder, tokenizer)
    batch = collated(student, teacher, CONVERSATIONS)
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    rng = np.random.default_rng(0)
    stop = ours.eos_token_id
    samples = [
        [
            Sample(tuple(rng.integers(0, len(ours), count).tolist()), end)
            for count, end in ((9, stop), (7, None))
        ]
        for _ in range(2)
    ]
    samples.append(
        [Sample((), stop), Sample(tuple(ours("a b c", add_special_tokens=False)["input_ids"]), stop)]
    )
    renderer = ChatRenderer.from_spec(theirs, teacher)
    made = BatchOfSamples(ours, [renderer])(batch, samples)
    assert made.sampled
    assert made.examples.tolist() == [0, 0, 1, 1, 2, 2]
    flat = [sample for several in samples for sample in several]
    prompts = [prompt for prompt in prompts_of(batch.student) for _ in range(2)]
    teacher_prompts = [prompt for prompt in prompts_of(batch.teachers[0]) for _ in range(2)]
    for row, (sample, prompt, teacher_prompt) in enumerate(zip(flat, prompts, teacher_prompts, strict=True)):
        ids = [*prompt, *sample.ids] + ([] if sample.stop is None else [sample.stop])
        kept = made.student.attention_mask[row].bool()
        assert made.student.input_ids[row][kept].tolist() == ids[:-1]
        assert made.student.labels[row][made.student.labels[row] != -100].tolist() == ids[len(prompt) :]
        text, spans = sampled_text(ours, sample.ids)
        response = (
            [*sample.ids]
            if made.alignments[0] is None
            else theirs(text, add_special_tokens=False)["input_ids"]
        )
        if made.alignments[0] is None or not any(token in text for token in theirs.all_special_tokens):
            whole = [*teacher_prompt, *response]
            if sample.stop is not None:
                whole.append(theirs.eos_token_id)
            row_ids = made.teachers[0].input_ids[row][made.teachers[0].attention_mask[row].bool()].tolist()
            assert row_ids == whole[:-1]
        assert made.response_bytes[row] == len(text.encode()) == spans.length
    if tokenizer == "bpe":
        assert made.alignments == (None,)
    else:
        assert_pairs_cover_the_same_bytes(made, flat, ours, theirs)


def assert_pairs_cover_the_same_bytes(made, samples, ours, theirs):
    """By brute force: the bytes that each token spells, for the pairs that were found."""
    from dskd_lightning.alignment.token_bytes import token_bytes

    aligned = made.alignments[0]
    assert len(aligned.pairs)
    sides = [
        (tokens, tokens.labels.flatten()[tokens.response]) for tokens in (made.student, made.teachers[0])
    ]
    for i, j in aligned.pairs.tolist():
        assert sides[0][0].sequence[i] == sides[1][0].sequence[j]
        row = int(sides[0][0].sequence[i])
        text = sampled_text(ours, samples[row].ids)[0].encode()
        ids = [int(labels[at]) for (_, labels), at in zip(sides, (i, j), strict=True)]
        if ids[0] == samples[row].stop:
            assert ids[1] == theirs.eos_token_id
            continue
        end = int(aligned.student_end[i])
        pieces = [token_bytes(t).pieces[k] for t, k in zip((ours, theirs), ids, strict=True)]
        assert text[:end].endswith(pieces[0]) or pieces[0] == b" " + text[:end]
        if "WordPiece" not in type(theirs.backend_tokenizer.model).__name__:  # which lowers case
            assert pieces[0].lstrip() == pieces[1].lstrip()


def test_draws_follow_the_prompt_and_the_step_alone(model_folder):
    student, _ = pair(model_folder)
    model, tokenizer = student.build()
    model.eval()
    sampler = GeneratorSampler(max_new_tokens=12)
    prompts = [[5, 6, 7], [8], [20, 21, 22, 23]]
    keys = [sample_key(prompt, 3, 0) for prompt in prompts]
    together = sampler(model, tokenizer, prompts, keys, 1)
    assert together == [sampler(model, tokenizer, [p], [k], 1)[0] for p, k in zip(prompts, keys, strict=True)]
    others = [sample_key(prompt, 4, 0) for prompt in prompts]
    assert together != sampler(model, tokenizer, prompts, others, 1)
    assert together != sampler(model, tokenizer, prompts, keys, 2)
    assert all(len(sample.ids) <= 12 for sample in together)
    assert all((sample.stop is None) == (len(sample.ids) == 12) for sample in together)


def test_repetition_counts_what_came_before():
    samples = [Sample((1, 2, 1, 2, 1)), Sample((1, 2, 3)), Sample((4,))]
    assert repetition(samples, 2) == (2, 6)
    assert repetition(samples, 4) == (0, 2)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_fraction_of_the_steps(fraction):
    settings = OnPolicySettings(fraction=fraction)
    found = [settings.samples_at(step, math.inf, seed=5) for step in range(2000)]
    assert abs(sum(found) / 2000 - fraction) < 0.04
    assert (fraction not in (0.0, 1.0)) or set(found) == {bool(fraction)}


def test_fraction_moves_over_training():
    settings = OnPolicySettings(fraction=[0.0, 0.0, 1.0])
    found = np.array([settings.samples_at(step, 4000, seed=0) for step in range(4000)])
    assert not found[:2000].any()
    assert abs(found[2000:3000].mean() - 0.25) < 0.05
    assert abs(found[3000:].mean() - 0.75) < 0.05


def test_buffer_draws_for_several_steps_at_once():
    """Windows are read ahead, every step learns from its own samples, none older than the buffer."""
    drawn, read, ages = [], [], []

    def windows():
        for step in range(10):
            read.append(step)
            yield [f"{step}a", f"{step}b"]

    def draw(prompts, keys):
        drawn.append(prompts)
        return [Sample((len(drawn), prompt[0])) for prompt in prompts]

    buffer = SampleBuffer(
        OnPolicySettings(fraction=1.0, buffer_steps=4, samples_per_prompt=2),
        prompts=lambda batch: [[int(batch[0])]],
        substitute=lambda batch, samples: (batch, samples),
        draw=draw,
    )
    for step, window in enumerate(buffer.replaced(windows(), 0, math.inf)):
        ages.append(buffer.age(step))
        assert [batch for batch, _ in window] == [f"{step}a", f"{step}b"]
        assert [samples for _, samples in window] == [[[Sample((step // 4 + 1, step))] * 2]] * 2
        assert len(read) == min(10, 4 * (step // 4 + 1))
    assert [len(prompts) for prompts in drawn] == [16, 16, 8]
    assert max(ages) == 3


OBJECTIVES = {
    "bpe": [
        dl.LogitKDObjective, dl.DSKDObjective, dl.DSKDv2Objective, dl.DSKDCrossAttentionObjective,
        dl.ALMObjective, dl.GOLDObjective,
    ],
    "sentencepiece": [
        dl.DSKDCrossAttentionObjective, dl.DSKDTokenAlignmentObjective, dl.ULDObjective, dl.GOLDObjective,
        dl.ALMObjective, dl.MinEditObjective, dl.XTokenHybridObjective, dl.XTokenProjectionObjective,
        dl.SharedVocabularyObjective,
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("tokenizer", "kind"), [(name, kind) for name, kinds in OBJECTIVES.items() for kind in kinds]
)
def test_samples_are_never_labels(model_folder, tokenizer, kind):
    """The loss doesn't depend on ``kd_ratio``, and cross-entropy of the samples has no part in it."""
    student, teacher = pair(model_folder, tokenizer)
    batch = collated(student, teacher, CONVERSATIONS)
    losses, gradients = [], []
    for ratio in (0.3, 1.0):
        torch.manual_seed(0)
        module = dl.DistillationModule(student, kind(kd_ratio=ratio), teacher)
        module.configure_model()
        renderers = [ChatRenderer.from_spec(load_tokenizer(teacher), teacher)]
        ids = module.tokenizer("apples and café 12", add_special_tokens=False)["input_ids"]
        samples = [[Sample(tuple(ids), 0)], [Sample(tuple(ids[:3]))], [Sample(tuple(ids[::-1]), 0)]]
        made = BatchOfSamples(module.tokenizer, renderers)(batch, samples)
        output = module.distil(made)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(
            torch.cat([p.grad.flatten() for p in module.student.parameters() if p.grad is not None])
        )
        assert output.tokens == made.student.response.numel()
        assert output.metrics["teacher_nll_per_byte"].value > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert math.isfinite(losses[0])
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("divergence", [dl.ForwardKL(), dl.ReverseKL(), JensenShannon(0.3)])
def test_loss_is_the_divergence_on_samples(model_folder, divergence):
    """Against whole logits in float64."""
    student, teacher = pair(model_folder)
    module = dl.DistillationModule(
        student, dl.LogitKDObjective(divergence, kd_ratio=0.5, temperature=1.5), teacher
    )
    module.configure_model()
    module.double()
    batch = collated(student, teacher, CONVERSATIONS)
    samples = [[Sample((30, 31, 32), 0)], [Sample((40, 41))], [Sample((), 0)]]
    prompts = prompts_of(batch.student)
    made = BatchOfSamples(module.tokenizer, [ChatRenderer.from_spec(module.tokenizer, student)])(
        batch, samples
    )
    expected = 0.0
    for prompt, [sample] in zip(prompts, samples, strict=True):
        ids = torch.tensor([[*prompt, *sample.ids]])
        with torch.no_grad():
            q, p = (
                (model(ids).logits[0, len(prompt) - 1 :] / 1.5).log_softmax(-1)
                for model in (module.student, module.teachers[0])
            )
        if sample.stop is None:
            q, p = q[:-1], p[:-1]
        if isinstance(divergence, dl.ForwardKL):
            each = (p.exp() * (p - q)).sum()
        elif isinstance(divergence, dl.ReverseKL):
            each = (q.exp() * (q - p)).sum()
        else:
            m = (0.3 * p.exp() + 0.7 * q.exp()).log()
            each = 0.3 * (p.exp() * (p - m)).sum() + 0.7 * (q.exp() * (q - m)).sum()
        expected += float(each)
    assert made.student.response.numel() == 4 + 2 + 1
    assert float(module.distil(made).loss.detach()) == pytest.approx(expected, rel=1e-9)


def test_a_resumed_run_learns_from_the_same_samples(model_folder, tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        module, data = make(
            model_folder, tmp_path, objective=dl.DSKDObjective(scale_inputs=False), batch_size=2,
            on_policy=OnPolicySettings(fraction=0.7, buffer_steps=4, max_new_tokens=6),
        )  # fmt: skip
        checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = L.Trainer(
            accelerator="cpu", logger=False, callbacks=[checkpoints], enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, accumulate_grad_batches=2, max_steps=10,
        )  # fmt: skip
        trainer.fit(module, datamodule=data, **options)
        return module

    whole = run(tmp_path / "whole")
    pending = []
    for step in range(1, 10):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        pending.append(len(torch.load(path, weights_only=True)["on_policy"][0]["samples"]))
    assert len(set(pending)) > 2  # checkpoints stand at several places of a buffer
    for step in (1, 2, 3, 6):
        again = run(tmp_path / f"again{step}", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        for name, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), (step, name)


def test_ranks_learn_as_one_process_does(model_folder, tmp_path):
    """The same global batches give the same samples, and so the same run."""
    rows = []
    for devices, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(devices)
        folder.mkdir()
        config = write_config(
            folder, model_folder(seed=1), model_folder(hidden=24, seed=2),
            **{
                "model.on_policy": {"fraction": 0.3, "buffer_steps": 3, "max_new_tokens": 8},
                "model.objective": {
                    "class_path": "dskd_lightning.objectives.LogitKDObjective",
                },
                "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
                "data.batch_size": batch, "trainer.devices": devices, "trainer.max_epochs": 1,
                "trainer.log_every_n_steps": 1,
                **({"trainer.strategy": "ddp"} if devices > 1 else {}),
            },
        )  # fmt: skip
        dskd_ranks("fit", "--config", str(config), folder=folder, ranks=devices)
        with (folder / "run" / "metrics.csv").open() as file:
            rows.append([row for row in csv.DictReader(file) if row.get("train/loss")])
    assert len(rows[0]) == len(rows[1]) >= 4
    for one, two in zip(*rows, strict=True):
        assert bool(one["train/samples_length"]) == bool(two["train/samples_length"])
        for name in ("train/loss", "train/tokens", "train/samples_length", "train/samples_finished"):
            if one[name]:
                assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4), name
    assert any(row["train/samples_length"] for row in rows[0])
    assert any(not row["train/samples_length"] for row in rows[0])


def test_several_samples_of_a_prompt(model_folder, tmp_path):
    seen = []

    class Watching(dl.DistillationModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    base, data = make(model_folder, tmp_path, batch_size=4)
    module = Watching(
        base.student_spec, dl.DSKDObjective(), base.teacher_specs,
        on_policy=OnPolicySettings(samples_per_prompt=3, max_new_tokens=6, buffer_steps=2),
    )  # fmt: skip
    fit(module, data, max_steps=3)
    assert [len(batch) for batch in seen] == [12, 12, 12]
    first = seen[0].student
    prompts = prompts_of(first)
    assert prompts[0] == prompts[1] == prompts[2]
    rows = [first.labels[row].tolist() for row in range(3)]
    assert rows[0] != rows[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fraction": 1.5}, "from 0 to 1"),
        ({"fraction": []}, "from 0 to 1"),
        ({"buffer_steps": 0}, "buffer_steps: 0 must be positive"),
        ({"top_p": 0}, "top_p: 0"),
    ],
)
def test_settings_out_of_range_are_one_sentence(settings, words):
    with pytest.raises(dl.UserError, match=words):
        dl.DistillationModule(
            dl.StudentSpec("a"),
            dl.DSKDObjective(),
            dl.TeacherSpec("b"),
            on_policy=OnPolicySettings(**settings),
        )


def test_what_learns_nothing_from_samples_is_refused(model_folder, tmp_path):
    with pytest.raises(dl.UserError, match="SFTObjective learns nothing from the student's own samples"):
        dl.DistillationModule(dl.StudentSpec("a"), dl.SFTObjective(), on_policy=OnPolicySettings())
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2),
        **{"model.on_policy": {}, "data.teacher_cache": {}},
    )  # fmt: skip
    result = dskd_fork("fit", "--config", str(config), check=False)
    assert result.returncode == 2, result.stderr[-2000:]
    assert "not on samples (model.on_policy); set it to null" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_student_that_says_nothing_is_found():
    buffer = SampleBuffer(
        OnPolicySettings(),
        prompts=lambda batch: [[1]] * 8,
        substitute=lambda batch, samples: batch,
        draw=lambda prompts, keys: [Sample((), 0)] * len(prompts),
    )
    with pytest.raises(dl.UserError, match="all 8 samples are empty"):
        next(buffer.replaced(iter([["batch"]]), 0, math.inf))


def test_a_student_that_never_ends_is_warned_of(caplog):
    buffer = SampleBuffer(
        OnPolicySettings(),
        prompts=lambda batch: [[1]] * 8,
        substitute=lambda batch, samples: batch,
        draw=lambda prompts, keys: [Sample((5, 6))] * len(prompts),
    )
    next(buffer.replaced(iter([["batch"]]), 0, math.inf))
    assert "none of 8 samples ended by itself" in caplog.text


def test_documents_are_refused_before_training(model_folder, tmp_path):
    """They have no prompt to sample for."""
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"prompt": "hi", "response": "hello"}\n')
    documents = tmp_path / "texts.jsonl"
    documents.write_text('{"text": "a whole document"}\n')
    student, teacher = pair(model_folder)
    module = dl.DistillationModule(student, dl.LogitKDObjective(), teacher, on_policy=OnPolicySettings())
    data = dl.InstructionDataModule(
        [str(file), str(documents)], student=student, teacher=teacher, cache_dir=str(tmp_path / "cache")
    )
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(dl.UserError, match=r"texts.jsonl:1 is a document without a prompt"):
        trainer.fit(module, datamodule=data)
