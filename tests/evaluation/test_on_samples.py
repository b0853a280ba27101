"""Student and teacher on what the student writes by itself."""

from __future__ import annotations

import json

import pytest
import torch
from test_distillation_module import make
from tiny_runs import dskd_fork, write_config

import dskd_lightning as dl
from dskd_lightning.callbacks.sample_fidelity import agreement_text
from dskd_lightning.data.samples import prompts_of
from dskd_lightning.evaluation.on_samples import sample_responses, sampled_batches, sampled_fidelity
from dskd_lightning.generation.samples import GeneratorSampler
from dskd_lightning.runs.samples import SampledResponse, read_samples, write_samples


def sampled(model_folder, tmp_path, teacher=None):
    module, data = make(model_folder, tmp_path, objective=dl.ALMObjective(), teacher=teacher)
    module.configure_model()
    data.setup("fit")
    batches = [next(iter(data.train_dataloader()))]
    return module, next(sampled_batches(module, batches, GeneratorSampler(max_new_tokens=8), seed=3))


def test_reverse_kl_is_the_mean_over_the_samples_positions(model_folder, tmp_path):
    """Against whole logits in float64, one sample at a time."""
    module, batch = sampled(model_folder, tmp_path)
    found = sampled_fidelity(module, batch)
    module.double()
    totals, count = {"reverse_kl": 0.0, "kl": 0.0, "teacher": 0.0, "own": 0.0}, 0
    for row, prompt in enumerate(prompts_of(batch.student)):
        labels = batch.student.labels[row]
        labels = labels[labels != -100]
        ids = torch.tensor([[*prompt, *labels[:-1].tolist()]])
        with torch.no_grad():
            q, p = (
                m(ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
                for m in (module.student, module.teachers[0])
            )
        totals["reverse_kl"] += float((q.exp() * (q - p)).sum())
        totals["kl"] += float((p.exp() * (p - q)).sum())
        totals["teacher"] -= float(p.gather(-1, labels[:, None]).sum())
        totals["own"] -= float(q.gather(-1, labels[:, None]).sum())
        count += len(labels)
    read = int(batch.response_bytes.sum())
    assert float(found["reverse_kl"].value) == pytest.approx(totals["reverse_kl"] / count, rel=1e-4)
    assert float(found["kl"].value) == pytest.approx(totals["kl"] / count, rel=1e-4)
    assert float(found["teacher_nll_per_byte"].value) == pytest.approx(totals["teacher"] / read, rel=1e-4)
    assert float(found["nll_per_byte"].value) == pytest.approx(totals["own"] / read, rel=1e-4)


@pytest.mark.parametrize("tokenizer", ["bpe", "sentencepiece"])
def test_pieces_add_up_to_each_models_likelihood(model_folder, tmp_path, tokenizer):
    teacher = dl.TeacherSpec(model_folder(hidden=24, seed=2, tokenizer=tokenizer))
    module, batch = sampled(model_folder, tmp_path, teacher)
    responses = sample_responses(module, batch, 3)
    found = sampled_fidelity(module, batch)
    assert len(responses) == 3
    whole = sample_responses(module, batch, 99)
    assert len(whole) == len(batch)
    own = -sum(sum(response.student) for response in whole)
    assert own == pytest.approx(float(found["nll_per_byte"].total), rel=1e-3)
    read = [score for response in whole for score in response.teacher if score is not None]
    assert read
    assert all(score <= 0 for score in read)
    if tokenizer == "bpe":
        assert -sum(read) == pytest.approx(float(found["teacher_nll_per_byte"].total), rel=1e-3)
    else:
        assert -sum(read) <= float(found["teacher_nll_per_byte"].total) + 1e-3


def test_opinions_are_by_the_teachers_probability(tmp_path):
    sample = SampledResponse("say", ("a", "b\x1b[31m", "c", "d"), (-1.0,) * 4, (-0.1, -1.0, -9.0, None))
    assert [opinion for _, opinion, _ in sample.opinions()] == ["likely", "doubtful", "unlikely", "unread"]
    assert "\x1b" not in agreement_text(sample).plain
    write_samples(tmp_path / "samples.json", [sample])
    assert read_samples(tmp_path / "samples.json") == (sample,)
    written = (tmp_path / "samples.json").read_text()
    (tmp_path / "samples.json").write_text(written.replace("-", "", 1))
    with pytest.raises(dl.UserError, match=r"samples\.json: isn't as it was written"):
        read_samples(tmp_path / "samples.json")
    assert read_samples(tmp_path / "none.json") == ()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"samples": [{"prompt": 1}]}', '{"samples": 3}',
                '{"samples": [{"prompt": "", "pieces": ["a"], "student": [], "teacher": []}]}']
)  # fmt: skip
def test_damaged_samples_are_one_sentence(tmp_path, content):
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(dl.UserError, match=r"samples\.json"):
        read_samples(tmp_path / "samples.json")


def test_validation_and_test_show_samples(model_folder, tmp_path):
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2),
        **{"samples": {"prompts": 3, "max_new_tokens": 6}, "trainer.max_epochs": 1},
    )  # fmt: skip
    fitted = dskd_fork("fit", "--config", str(config))
    assert "samples at step" in fitted.stdout
    model = json.loads((tmp_path / "run" / "samples.json").read_text())["model"]
    assert (model["checkpoint"], model["step"]) == (None, 4)
    assert "val/samples_reverse_kl" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    dskd_fork("test", "--config", str(config))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name in ("reverse_kl", "teacher_nll_per_byte", "nll_per_byte", "length", "finished", "repeated_4"):
        assert metrics[f"samples_{name}"] >= 0
    assert len(read_samples(tmp_path / "run" / "samples.json")) == 2
    model = json.loads((tmp_path / "run" / "samples.json").read_text())["model"]
    assert model == {name: value for name, value in metrics["model"].items() if name != "weights"}
    assert model["checkpoint"] == "best.ckpt"


def test_a_cache_is_refused_before_a_batch_is_read(model_folder, tmp_path):
    """Not at the end of the first epoch, nor behind a test's generated responses."""
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **{"data.teacher_cache": {}}
    )  # fmt: skip
    asked = ("--config", str(config), "--samples.prompts", "3")
    refused = dskd_fork("fit", *asked, check=False)
    assert refused.returncode == 2
    assert "set data.teacher_cache to null" in refused.stderr
    assert "val/" not in refused.stdout + refused.stderr
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    dskd_fork("fit", "--config", str(config))
    for command in ("validate", "test"):
        refused = dskd_fork(command, *asked, check=False)
        assert refused.returncode == 2
        assert "set data.teacher_cache to null" in refused.stderr
    assert "responses:" not in refused.stderr.lower()
    assert not list((tmp_path / "run").glob("*predictions*"))
