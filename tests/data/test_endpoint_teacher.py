"""Teachers behind an endpoint or in a field: the values of the teacher itself, and what may go wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from logprob_server import Server, serving
from tiny_runs import write_config, write_data

import dskd_lightning as dl
from dskd_lightning.cli import main
from dskd_lightning.models.spec import EndpointSpec
from dskd_lightning.objectives import ALMObjective, TopKObjective
from dskd_lightning.teacher_cache import ensure_log_probabilities, log_probabilities
from dskd_lightning.teacher_cache.told import entries_of

K = 4


@pytest.fixture
def server(model_folder):
    with serving(Server(model_folder(seed=2))) as running:
        yield running


def spec(server: Server, folder: str, **options) -> dl.TeacherSpec:
    defaults = {"top_k": K, "retries": 0, "backoff": 0.0}
    return dl.TeacherSpec(folder, endpoint=EndpointSpec(server.url, "tiny", **{**defaults, **options}))


def datamodule(folder: str, teacher: dl.TeacherSpec, tmp_path: Path, data=None, **options):
    file = data or write_data(tmp_path / "data.jsonl", count=6)
    return dl.InstructionDataModule(
        str(file), student=dl.StudentSpec(folder), teacher=teacher, max_length=80, max_prompt_length=40,
        batch_size=6, cache_dir=str(tmp_path / "cache"), **options,
    )  # fmt: skip


def told(data, teacher):
    ensure_log_probabilities(data, [teacher])
    batch = data.train_dataloader().collator([[i] for i in range(len(data.examples("train")))])
    return batch, batch.teacher_hidden[0]


def local(folder: str, batch) -> torch.Tensor:
    """``[m, vocab]`` log-probabilities of the same teacher when it is here."""
    module = dl.DistillationModule(dl.StudentSpec(folder), TopKObjective(), dl.TeacherSpec(folder))
    module.configure_model()
    side = module.teacher_side(0, batch.teachers[0])
    return side.head.logits(side.hidden).log_softmax(-1)


@pytest.mark.parametrize("api", ["echo", "prompt_logprobs"])
def test_values_are_those_of_the_teacher_that_is_here(model_folder, server, tmp_path, api) -> None:
    folder = model_folder(seed=2)
    teacher = spec(server, folder, api=api)
    batch, found = told(datamodule(model_folder(seed=1), teacher, tmp_path), teacher)
    log_p = local(folder, batch)
    tokens = batch.teachers[0]
    assert found.known.all()
    assert torch.equal(found.ids[:, 0], tokens.select(tokens.labels))
    there = found.ids >= 0
    expected = log_p.gather(-1, found.ids.clamp(min=0))
    torch.testing.assert_close(found.values[there], expected[there], rtol=1e-4, atol=1e-5)
    best = log_p.topk(K).indices
    for row, kept in zip(best.tolist(), found.ids.tolist(), strict=True):
        missing = set(row) - set(kept)
        assert not missing or api == "echo"  # a text may stand for several tokens, which is then left out
    assert all(request["model"] == "tiny" for request in server.requests)


def test_training_on_it_is_training_on_the_teacher(model_folder, server, tmp_path) -> None:
    folder, losses = model_folder(seed=2), []
    for teacher in (dl.TeacherSpec(folder), spec(server, folder, api="prompt_logprobs")):
        data = datamodule(model_folder(seed=1), teacher, tmp_path, val_split=2)
        module = dl.DistillationModule(
            dl.StudentSpec(model_folder(seed=1)), TopKObjective(k=K), teacher,
            lambda p: torch.optim.SGD(p, lr=0.1),
        )  # fmt: skip
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_steps=3,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("top_k", [0, 3])
def test_an_endpoint_teaches_a_student_with_another_tokenizer(model_folder, server, tmp_path, top_k) -> None:
    teacher = spec(server, model_folder(seed=2), top_k=top_k)
    student = model_folder(tokenizer="sentencepiece", seed=1)
    module = dl.DistillationModule(dl.StudentSpec(student), ALMObjective(), teacher)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule(student, teacher, tmp_path))
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))
    assert float(trainer.callback_metrics["train/kd"]) > 0


def test_busy_servers_are_asked_again_and_partial_caches_go_on(
    model_folder, server, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(log_probabilities, "_SHARD_TOKENS", 1)  # a shard for each example
    teacher = spec(server, model_folder(seed=2), retries=2, parallel=1)
    server.failures = 2
    server.fails_after = 5  # two failures, three answers
    data = datamodule(model_folder(seed=1), teacher, tmp_path)
    with pytest.raises(dl.UserError, match="what was collected is kept"):
        told(data, teacher)
    asked = len(server.requests)
    assert asked == 2 + 3 + 3
    server.fails_after = None
    _, found = told(data, teacher)
    assert len(server.requests) == asked + 3  # of six
    assert found.known.all()
    told(data, teacher)
    assert len(server.requests) == asked + 3


@pytest.mark.parametrize(
    ("mode", "api", "message"),
    [
        ("silent", "echo", "without log-probabilities: try `api: prompt_logprobs`"),
        ("silent", "prompt_logprobs", "without log-probabilities: try `api: echo`"),
        ("other", "echo", "another vocabulary"),
    ],
)
def test_servers_that_do_not_fit_are_one_sentence(model_folder, server, tmp_path, mode, api, message) -> None:
    server.mode = mode
    teacher = spec(server, model_folder(seed=2), api=api, retries=3, parallel=1)
    with pytest.raises(dl.UserError, match=message):
        told(datamodule(model_folder(seed=1), teacher, tmp_path), teacher)
    assert len(server.requests) <= 2  # nothing of this gets better by asking again


def test_another_vocabulary_is_seen_by_ids_too(model_folder, server, tmp_path) -> None:
    other = model_folder(tokenizer="sentencepiece", seed=2)  # its ids mean something else to the server
    server.model.resize_token_embeddings(1000, mean_resizing=False)
    with pytest.raises(dl.UserError, match="another vocabulary"):
        told(
            datamodule(model_folder(seed=1), spec(server, other), tmp_path),
            spec(server, other),
        )


def test_the_key_the_limits_and_the_estimate(model_folder, server, tmp_path, monkeypatch) -> None:
    teacher = spec(server, model_folder(seed=2), api_key_variable="TEACHER_KEY")
    data = datamodule(model_folder(seed=1), teacher, tmp_path)
    with pytest.raises(dl.UserError, match="TEACHER_KEY is not set"):
        told(data, teacher)
    monkeypatch.setenv("TEACHER_KEY", "secret")
    teacher = spec(server, model_folder(seed=2), api_key_variable="TEACHER_KEY", price_per_million=2.0)
    data = datamodule(model_folder(seed=1), teacher, tmp_path)
    (estimate,) = ensure_log_probabilities(data, [teacher], estimate_only=True)
    assert not server.requests
    told(data, teacher)
    assert estimate.requests == len(server.requests) == 6
    assert estimate.tokens == sum(len(request["prompt"]) for request in server.requests)
    assert set(server.keys) == {"Bearer secret"}
    few = spec(server, model_folder(seed=2), most_tokens=5, top_k=1)
    with pytest.raises(dl.UserError, match="more than `most_tokens: 5`"):
        told(datamodule(model_folder(seed=1), few, tmp_path), few)
    assert len(server.requests) == 6


@pytest.mark.parametrize("form", ["vllm", "chat", "completions", "numbers"])
def test_a_field_of_the_records_teaches_the_same(model_folder, server, tmp_path, form) -> None:
    folder, student = model_folder(seed=2), model_folder(seed=1)
    teacher = spec(server, folder, api="prompt_logprobs")
    batch, expected = told(datamodule(student, teacher, tmp_path), teacher)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    counts = torch.bincount(batch.teachers[0].sequence).tolist()
    start = 0
    name = server.tokenizer.convert_ids_to_tokens
    for row, count in zip(rows, counts, strict=True):
        part = expected[slice(start, start + count)]
        start += count
        pairs = [
            [(i, v) for i, v in zip(ids, values, strict=True) if i >= 0]
            for ids, values in zip(part.ids.tolist(), part.values.tolist(), strict=True)
        ]
        row["scores"] = {
            "vllm": [{str(i): {"logprob": v} for i, v in entries} for entries in pairs],
            "chat": {
                "content": [
                    {
                        "token": name(entries[0][0]),
                        "logprob": entries[0][1],
                        "top_logprobs": [{"token": f"token_id:{i}", "logprob": v} for i, v in entries],
                    }
                    for entries in pairs
                ]
            },
            "completions": {
                "tokens": [name(entries[0][0]) for entries in pairs],
                "token_logprobs": [entries[0][1] for entries in pairs],
                "top_logprobs": [{f"token_id:{i}": v for i, v in entries} for entries in pairs],
            },
            "numbers": [entries[0][1] for entries in pairs],
        }[form]
    file = tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = dl.TeacherSpec(folder, log_probabilities="scores")
    _, found = told(datamodule(student, own, tmp_path, file), own)
    columns = 1 if form == "numbers" else 1 + K
    there = expected.ids[:, :columns] >= 0
    assert torch.equal(found.ids[:, :columns][there], expected.ids[:, :columns][there])
    torch.testing.assert_close(found.values[:, :columns][there], expected.values[:, :columns][there])
    rows[2]["scores"] = [{"1": {"logprob": -1.0}}] * 40
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(dl.UserError, match=r"scored.jsonl:3 .*tokenizer"):
        told(datamodule(student, own, tmp_path, file), own)
    lacking = dl.TeacherSpec(folder, log_probabilities="lacking")
    with pytest.raises(dl.UserError, match="has no field 'lacking'"):
        told(datamodule(student, lacking, tmp_path, file), lacking)


def test_objectives_that_need_more_are_refused_before_anything_is_asked(model_folder, server) -> None:
    teacher, student = spec(server, model_folder(seed=2)), dl.StudentSpec(model_folder(seed=1))
    with pytest.raises(dl.UserError, match="DSKDObjective needs the teacher's hidden states"):
        dl.DistillationModule(student, dl.DSKDObjective(), teacher)
    from dskd_lightning.training.on_policy import OnPolicySettings

    with pytest.raises(dl.UserError, match="on_policy"):
        dl.DistillationModule(student, TopKObjective(), teacher, on_policy=OnPolicySettings())
    other = dl.StudentSpec(model_folder(tokenizer="sentencepiece", seed=1))
    module = dl.DistillationModule(other, TopKObjective(), teacher)
    with pytest.raises(dl.UserError, match="one vocabulary"):
        module.configure_model()
    assert not server.requests


def test_the_command_collects_and_tells_the_cost_first(model_folder, server, tmp_path, capsys) -> None:
    config = write_config(tmp_path, model_folder(seed=1), model_folder(seed=2))
    values = yaml.safe_load(Path(config).read_text())
    values["model"]["objective"] = {"class_path": "dskd_lightning.objectives.TopKObjective"}
    values["model"]["teacher"]["endpoint"] = {"base_url": server.url, "top_k": 2, "price_per_million": 1.0}
    values["data"]["teacher_cache"] = None
    Path(config).write_text(yaml.safe_dump(values))
    assert main(["cache", str(config), "--estimate"]) == 0
    assert "requests with" in capsys.readouterr().out
    assert not server.requests
    assert main(["cache", str(config)]) == 0
    asked = len(server.requests)
    assert asked == 16  # of 24 records those that train: what an endpoint is asked costs money
    assert main(["fit", "--config", str(config)]) == 0
    assert "teacher (log-probabilities)" in capsys.readouterr().out
    assert main(["test", "--config", str(tmp_path / "run" / "config.yaml")]) == 0
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "nll_per_token" in str(scores)
    assert len(server.requests) == asked


def test_entries_refuse_what_is_none() -> None:
    assert entries_of(None) == []
    with pytest.raises(ValueError, match="no log-probability"):
        entries_of("text")
