"""The benchmarks run at tiny sizes, agree with the plain computation, and print their tables.

Cases run in this process instead of one each: starting Python is most of the time otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "objectives"))
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "models"))

import comparing
import dataset_size
import fused_loss
import gold
import on_policy
import planning
import preparation
import projected_teacher
import pruned_parts
import responses
import short_records
import state_codecs
import torch
import training_step
from _measure import Measured
from _training import tiny_source
from cross_tokenizer_cases import make_case
from model_families import separate_rows
from transformers import LlamaConfig, LlamaForCausalLM

from dskd_lightning import DSKDObjective, OnPolicySettings, TeacherSpec
from dskd_lightning.models.loading import load_tokenizer
from dskd_lightning.models.tokenizer_swap import train_bpe
from dskd_lightning.planning.pruned_sizes import PruningStudy
from dskd_lightning.structures import Head


def measure(case, name: str, arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> Measured:
    case(name, arguments)
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return Measured(line.pop("seconds"), line.pop("extra_mb"), line.pop("total_mb"), line)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("limit_mb", [100.0, 0.001])
def test_fused_loss_compares_with_plain_or_says_why_not(
    limit_mb: float, train_head: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = argparse.Namespace(
        dtype=["float32"], vocabulary=[64], tokens=[16], hidden=8, teacher_hidden=16, train_head=train_head,
        repeat=1, rounds=1, limit_mb=limit_mb,
    )  # fmt: skip
    monkeypatch.setattr(
        fused_loss,
        "interleave",
        lambda _, cases, rounds: {name: measure(fused_loss.case, name, sizes, capsys) for name in cases},
    )
    row = fused_loss.compare_one(sizes, "float32", 64, 16)
    assert len(row) == 9
    assert ("skipped" in row[3]) == (limit_mb < 1)


def test_reference_layout_and_ours_start_from_one_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = tiny_source(tmp_path)
    sizes = argparse.Namespace(
        source=source, data=data, layers=1, examples=4, batch_size=2, max_length=64, rounds=1
    )
    found = {name: measure(training_step.case, name, sizes, capsys) for name in training_step.CASES}
    ours, theirs = (found[n].more for n in ("ours, same batches", training_step.REFERENCE))
    assert ours["tokens"] == theirs["tokens"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=0.02)
    assert ours["padding"] < theirs["padding"]
    assert all(len(training_step.row(name, m, found)) == 10 for name, m in found.items())


def test_short_records_are_the_first_that_are_short(tmp_path: Path, monkeypatch, capsys) -> None:
    rows = [
        {"instruction": "a" * 5, "input": "", "output": "b" * 5},
        {"topic": "t" * 99, "instruction": "a" * 5, "context": "c" * 2, "response": "b" * 4},
        {"instruction": "a" * 5, "context": "", "response": "ü\u2028"},
        {"instruction": "a", "output": "b"},
    ]
    source, target = tmp_path / "source.jsonl", tmp_path / "made" / "target.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    arguments = ["short_records.py", str(source), str(target), "--characters", "10", "--most", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    short_records.main()
    assert [json.loads(line) for line in target.read_text().splitlines()] == [
        {"instruction": "a" * 5, "input": "", "output": "b" * 5},
        {"instruction": "a" * 5, "input": "", "output": "ü\u2028"},
    ]
    assert "2 of 4 records" in capsys.readouterr().out


def test_gold_trains_across_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = tiny_source(tmp_path)
    sizes = argparse.Namespace(
        source=source, data=data, layers=1, examples=4, batch_size=2, max_length=64, rounds=1
    )
    tokenizer = train_bpe(["the fox jumps over apples"] * 4, 280, like=load_tokenizer(TeacherSpec(source)))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes.tokenizer = str(tmp_path / "tokenizer")
    found = measure(gold.case, gold.OURS, sizes, capsys)
    assert found.more["steps"] == 2
    assert found.more["first_loss"] > 0


def test_sampling_at_once_gives_the_same_responses(tmp_path: Path) -> None:
    source, data = tiny_source(tmp_path)
    sizes = argparse.Namespace(
        source=source, data=data, layers=1, examples=4, batch_size=2, max_length=64, rounds=1
    )
    module = on_policy.module_of(sizes, DSKDObjective())
    module.configure_model()
    module.float()
    found = on_policy.batches(sizes)
    prompts = [prompt for batch in found for prompt in on_policy.prompts_of(batch.student)]
    result = on_policy.sampling(module, prompts, 5, 1)
    assert result["same"] == len(prompts) == 4
    whole, spent = on_policy.training(module, found, OnPolicySettings(max_new_tokens=5))
    assert 0 < spent < whole


def test_dataset_size_reads_every_example(capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(lambda name, a: dataset_size.case(int(name)), "30", argparse.Namespace(), capsys)
    assert found.more["tokens"] > 30 * 20
    assert found.more["read"] > 0


def test_preparation_beside_bare_tokenization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = tiny_source(tmp_path)
    words = ["--data", data, "--tokenizers", source, source, "--examples", "1100", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["preparation.py", *words])
    preparation.main()
    shown = capsys.readouterr().out
    assert "1,100 conversations for two tokenizers" in shown
    assert [line for line in shown.splitlines() if "prepared by 2 processes" in line]


@pytest.mark.parametrize("mode", planning.MODES)
def test_planning_counts_padding_as_a_loop_does(mode: str) -> None:
    how = planning.MODES[mode]
    plan, lengths = planning.planned(how, np.arange(300), planning.drawn(300), planning.kinds_of(how, 300))
    assert len(lengths) == (376 if how.weights else 300)
    expected = [len(batch) * max(sum(lengths[i] for i in row) for row in batch) for batch in plan]
    assert planning.padded_tokens(plan, lengths).tolist() == expected
    steps = [expected[i : i + 8] for i in range(0, len(expected) // 8 * 8, 8)]
    ratios = [max(step) / (sum(step) / 8) - 1 for step in steps]
    assert planning.unevenness(plan, lengths) == pytest.approx(sum(ratios) / max(len(ratios), 1))


def test_comparing_two_runs(capsys: pytest.CaptureFixture[str]) -> None:
    comparing.case(5)
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line["size"] > 0


def test_responses_to_many_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    responses.case(40)
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 < line["predicted"] < line["seconds"][0]


def test_stored_states_are_compared_with_exact_ones() -> None:
    hidden = torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
    hidden[:, 3] += 40
    head = Head(torch.randn(30, 64, generator=torch.Generator().manual_seed(1)) / 8)
    rows = {row[0]: row[1:] for row in state_codecs.rows_of(hidden, head, 50, torch.float32)}
    assert [rows[name][0] for name in ("bfloat16", "int8", "int4")] == ["128", "68", "34"]
    kl = {name: float(row[2]) for name, row in rows.items()}
    assert kl["int8"] < kl["int4"] < kl["4 bits, a scale a row alone"]
    assert kl["int8"] < kl["8 bits, a scale a row alone"]
    true, other = (h.double() @ head.weight.double().T for h in (hidden, hidden + 0.1))
    p, q = true.log_softmax(-1), other.log_softmax(-1)
    largest, same = state_codecs.distances(hidden, hidden + 0.1, head)
    assert largest == pytest.approx(float((p.exp() * (p - q)).sum(-1).max()), rel=1e-3)
    assert same == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def test_the_projected_teacher_is_measured_against_formulas() -> None:
    case = make_case()
    study = projected_teacher.Study(
        *(
            replace(space, head=Head(space.head.weight.float()), embeddings=space.embeddings.float())
            for space in (case.student_space, case.teacher_space)
        )
    )
    i, j = case.alignment.pairs.unbind(1)
    student, teacher = case.student.hidden[i].detach().float(), case.teacher.hidden[j].float()
    logits = teacher.double() @ study.teacher.head.weight.double().T
    choice = study.to_student[logits.argmax(-1)]
    pairs = projected_teacher.Pairs(student, teacher, case.student.labels[i], choice)
    own = student.double() @ study.student.head.weight.double().T
    p, q = logits[:, study.partners].log_softmax(-1), own[:, study.shared].log_softmax(-1)
    known = choice >= 0
    cross_entropy = torch.nn.functional.cross_entropy
    wanted = [
        cross_entropy(own, pairs.gold), cross_entropy(own[known], choice[known]),
        (p.exp() * (p - q)).sum(-1).mean(), -(own.softmax(-1) * own.log_softmax(-1)).sum(-1).mean(),
    ]  # fmt: skip
    found = study.row(pairs, student, study.student.head, None)
    assert [float(found[at]) for at in (0, 2, 4, 5)] == pytest.approx([float(w) for w in wanted], abs=0.006)
    sizes = argparse.Namespace(rates=[0.05], steps=20, rows=8, labels=["teacher", "gold", "distribution"])
    rows = {(row[0], row[1]): row[2:] for row in projected_teacher.table(study, pairs, pairs, sizes)}
    assert len(rows) == 9
    untrained, trained = rows["projected, untrained", "0"], rows["teacher's token, 0.05", "20"]
    assert float(trained[2]) < float(untrained[2])
    assert float(rows["human token, 0.05", "20"][0]) < float(untrained[0])
    learnt = rows["teacher's distribution, 0.05", "20"]
    assert float(learnt[4]) < min(float(untrained[4]), float(trained[4]))


@pytest.mark.parametrize("part", ["groups", "dimensions"])
@torch.no_grad()
def test_zeroed_parts_are_as_if_they_were_gone(part: str) -> None:
    """Against a smaller model, built of the weights that are left."""
    config = LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, tie_word_embeddings=True, rms_norm_eps=1e-9,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    whole, batch = copy.deepcopy(model), separate_rows(60)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.load_state_dict(whole.state_dict())
    if part == "groups":
        saved = pruned_parts.without_groups(model, 1, [batch])
        config.num_attention_heads, config.num_key_value_heads = 4, 2
    else:
        saved = pruned_parts.without_dimensions(model, 4, [batch])
        config.hidden_size = 20
        kept = model.get_input_embeddings().weight.abs().sum(0).nonzero()[:, 0]
    smaller = LlamaForCausalLM(config).eval()
    assert saved == whole.num_parameters() - smaller.num_parameters()
    for name, target in smaller.named_parameters():
        weight = whole.get_parameter(name)
        if part == "dimensions":
            outward = name.endswith(("o_proj.weight", "down_proj.weight")) or weight.dim() == 1
            weight = weight.index_select(0 if outward else 1, kept)
        elif "self_attn" in name:
            left = (
                model.get_parameter(f"{name.rsplit('.', 2)[0]}.o_proj.weight").abs().sum(0).view(3, 8).sum(1)
            )
            dim = int("o_proj" in name)
            each = (left > 0).repeat_interleave(weight.shape[dim] // 3)
            weight = weight.index_select(dim, each.nonzero()[:, 0])
        target.copy_(weight)
    expected = smaller(batch.input_ids, attention_mask=batch.attention_mask).logits
    zeroed = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(batch.select(zeroed), batch.select(expected))


def test_parts_of_like_size_are_cut(tmp_path: Path) -> None:
    source, _ = tiny_source(tmp_path)
    data = tmp_path / "more.jsonl"
    lines = [json.dumps({"prompt": f"Say {n}.", "response": f"{n} {n}"}) for n in range(40)]
    data.write_text("\n".join(lines))
    found = list(pruned_parts.rows(PruningStudy(source, str(data), examples=32)))
    assert [row[0].split()[-1] for row in found] == ["nothing", "layer", "layers", "layer", "dimensions"]
    assert all(float(row[2].replace(",", "")) > 1 for row in found)
