"""DSKD with cross-model attention: the authors' numbers, and formulas written per example."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cross_tokenizer_cases import Case, make_case, unaligned
from safetensors.torch import load_file
from torch.nn import functional as F

from dskd_lightning.alignment.cross_model_attention import CrossModelAttention
from dskd_lightning.alignment.key_query_matching import AdversarialMatching, ConditionalTransport
from dskd_lightning.errors import UserError
from dskd_lightning.functional import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from dskd_lightning.objectives.dskd_cma import DSKDCrossAttentionObjective
from dskd_lightning.structures import Head, ModelSpace, PaddedStatistics, Side
from dskd_lightning.training.whole_steps import measure_whole_steps, settle

DIVERGENCES = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "js_divergence": JensenShannon(),
    "skewed_forward_kl": SkewedForwardKL(),
    "skewed_reverse_kl": SkewedReverseKL(),
    "adaptive_kl": AdaptiveKL(),
}


def reference_side(case, name, weight, hidden):
    labels = case[f"{name}_labels"]
    keep = labels != -100
    return Side(
        hidden=hidden[keep],
        head=Head(weight),
        embeddings=case[f"{name}_embed"],
        ids=case[f"{name}_input_ids"][keep],
        labels=labels[keep],
        sequence=keep.nonzero()[:, 0],
        padded=PaddedStatistics(keep.numel(), case[f"{name}_hidden"].std()),
    )


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("memory_budget_mb", [0.001, 1024])
def test_matches_published_numbers(reference_dir, name, memory_budget_mb):
    prefix = f"dskd_cma/{name}/"
    stored = load_file(reference_dir / "dskd_v1.safetensors")
    case = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    objective = DSKDCrossAttentionObjective(
        DIVERGENCES[name],
        CrossModelAttention(statistics="padded", scale_inputs=False),
        memory_budget_mb=memory_budget_mb,
        scale_inputs=False,
    )
    hidden = case["student_hidden"].requires_grad_()
    weight = case["student_head"].requires_grad_()
    objective.configure(
        ModelSpace(Head(weight), case["student_embed"]),
        ModelSpace(Head(case["teacher_head"]), case["teacher_embed"]),
    )
    modules = {"query": objective.attention.query, "t2s": objective.t2s, "s2t": objective.s2t}
    for key, module in modules.items():
        module.load_state_dict({k: case[f"projector.{key}.0.{k}"] for k in ("weight", "bias")})
    student = reference_side(case, "student", weight, hidden)
    teacher = reference_side(case, "teacher", case["teacher_head"], case["teacher_hidden"])
    assert objective.needs_padded_statistics
    output = objective(student, teacher)
    loss = output.loss / output.tokens
    loss.backward()

    def check(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    check(loss.detach(), case["loss"])
    logged = {"nll_loss": "ce", "kd_loss": "kd"} | {f"{k}_loss": k for k in ("t2s_ce", "t2s_kd", "s2t_kd")}
    for theirs, ours in logged.items():
        check(output.terms[ours].value, case[f"log.{theirs}"])
    logged = {"accuracy": "student_accuracy", "t2s_acc": "t2s_accuracy", "s2t_acc": "s2t_accuracy"}
    for theirs, ours in (logged | {"max_t2s_prob": "max_t2s_prob"}).items():
        check(output.metrics[ours].value.float(), case[f"log.{theirs}"])
    check(hidden.grad, case["grad_student_hidden"])
    check(weight.grad, case["grad_student_head"])
    for key, module in modules.items():
        check(module.weight.grad, case[f"grad_projector.{key}.0.weight"])
        check(module.bias.grad, case[f"grad_projector.{key}.0.bias"])


def naive(case: Case, objective: DSKDCrossAttentionObjective, causal: bool):
    """The loss of METHODS' text, example by example in float64."""
    s, t, a = case.student, case.teacher, case.alignment
    flat = torch.cat([t.embeddings[t.ids], t.embeddings[t.labels]], -1)
    targets = t.embeddings[t.labels]
    values = t.hidden / t.hidden.std() + targets / targets.std()
    total = 0.0
    for b in range(int(s.sequence.max()) + 1):
        i, j = (s.sequence == b).nonzero()[:, 0], (t.sequence == b).nonzero()[:, 0]
        query = objective.attention.query(torch.cat([s.embeddings[s.ids[i]], s.embeddings[s.labels[i]]], -1))
        scores = query @ (flat[j] / flat.std()).T / math.sqrt(flat.shape[1])
        forward, backward = scores, scores.T
        if causal:
            later = a.teacher_end[j][None, :] > a.student_end[i][:, None]
            earlier = a.teacher_end[j][None, :] < a.student_end[i][:, None]
            forward, backward = scores.masked_fill(later, -1e9), scores.T.masked_fill(earlier.T, -1e9)
        ok_s, ok_t = (forward > -1e8).any(1), (backward > -1e8).any(1)
        z = (forward.softmax(-1) @ objective.t2s(values[j])) @ s.head.weight.detach().T
        back = (backward.softmax(-1) @ objective.s2t(s.hidden[i])) @ t.head.weight.T
        logits, gold = s.hidden[i] @ s.head.weight.T, s.labels[i]
        total = total + 0.5 * F.cross_entropy(logits, gold, reduction="sum")
        total = total + 0.5 * F.cross_entropy(z[ok_s], gold[ok_s], reduction="sum")

        def fkl(p_logits, q_logits):
            p, q = (p_logits / 2).log_softmax(-1), (q_logits / 2).log_softmax(-1)
            return (p.exp() * (p - q)).sum()

        hit = ok_s & (z.argmax(-1) == gold)
        total = total + 0.5 * fkl(z[hit].detach(), logits[hit])
        total = total + 0.5 * fkl((t.hidden[j] @ t.head.weight.T)[ok_t], back[ok_t])
    return total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("memory_budget_mb", [0.001, 1024])
def test_matches_the_formula(causal, memory_budget_mb):
    case = make_case()
    objective = DSKDCrossAttentionObjective(
        attention=CrossModelAttention(causal=causal), memory_budget_mb=memory_budget_mb
    )
    output = case.run(objective)
    expected = naive(case, objective, causal)
    torch.testing.assert_close(output.loss, expected)
    parameters = list(objective.parameters())
    for actual, wanted in zip(
        case.gradients(output.loss, *parameters), case.gradients(expected, *parameters), strict=True
    ):
        torch.testing.assert_close(actual, wanted)
    assert {"alignment_ratio", "vocabulary_coverage", "partner_attention"} <= set(output.metrics)
    s, t, (i, j) = case.student, case.teacher, case.alignment.pairs.unbind(1)
    attention = objective.attention(s, t, case.alignment)
    read = attention.teacher_reads[j]
    own, other = (s.hidden @ s.head.weight.T).argmax(-1)[i], (t.hidden @ t.head.weight.T).argmax(-1)[j]
    z = attention.to_student(objective.t2s(objective.attention.teacher_values(t))) @ s.head.weight.T
    back = attention.to_teacher(objective.s2t(s.hidden)) @ t.head.weight.T
    same = {
        "agreement": own == objective.teacher_to_student[other],
        "t2s_agreement": z.argmax(-1)[i] == objective.teacher_to_student[other],
        "s2t_agreement": back.argmax(-1)[j] == objective.student_to_teacher[own],
    }
    assert all(output.metrics[name].count == int(read.sum()) for name in same)
    for name, mask in same.items():
        torch.testing.assert_close(output.metrics[name].value.double(), mask[read].double().mean())
    assert all(torch.isfinite(ratio.value) for ratio in output.metrics.values())


def test_causal_attention_reads_no_later_text():
    case = make_case()
    attention = CrossModelAttention(causal=True)
    attention.configure(case.student_space, case.teacher_space)
    attention.double()
    weights = attention(case.student, case.teacher, case.alignment)
    ends_s = weights.student.pad(case.alignment.student_end)
    ends_t = weights.teacher.pad(case.alignment.teacher_end)
    later = ends_t.unsqueeze(1) > ends_s.unsqueeze(2)
    assert weights.t2s[later].abs().max() == 0
    assert weights.s2t.transpose(1, 2)[ends_t.unsqueeze(1) < ends_s.unsqueeze(2)].abs().max() == 0
    reads = weights.to_student(torch.ones(len(case.teacher), 1).double())[:, 0]
    torch.testing.assert_close(reads, weights.student_reads.double())
    with pytest.raises(ValueError, match="causal"):
        attention(case.student, case.teacher)


def test_examples_do_not_attend_to_each_other():
    """Two examples at once give what each gives alone, but for the shared standard deviations."""
    case = make_case()
    attention = CrossModelAttention()
    attention.configure(case.student_space, case.teacher_space)
    attention.double()
    both = attention(case.student, case.teacher)
    for b in range(3):
        n, m = (int((side.sequence == b).sum()) for side in (case.student, case.teacher))
        scores = (
            both.queries.split(both.student.counts.tolist())[b]
            @ both.keys.split(both.teacher.counts.tolist())[b].T
            / math.sqrt(both.keys.shape[1])
        )
        torch.testing.assert_close(both.t2s[b, :n, :m], scores.softmax(-1))
        torch.testing.assert_close(both.s2t[b, :m, :n], scores.T.softmax(-1))
        assert both.t2s[b, n:].abs().sum() == 0 == both.t2s[b, :, m:].abs().sum()


def test_padded_statistics_equal_those_of_the_padded_tensor():
    case = make_case()
    teacher = replace(case.teacher, padded=PaddedStatistics(100, torch.tensor(2.0)))
    attention = CrossModelAttention(statistics="padded")
    filler = teacher.embeddings[0].expand(100 - len(teacher), -1)
    targets = torch.cat([teacher.embeddings[teacher.labels], filler])
    expected = teacher.hidden / 2 + teacher.embeddings[teacher.labels] / targets.std()
    torch.testing.assert_close(attention.teacher_values(teacher), expected)
    keys = torch.cat([torch.cat([teacher.embeddings[teacher.ids], filler]), targets], -1)
    torch.testing.assert_close(attention._keys(teacher), (keys / keys.std())[: len(teacher)])


def test_one_tokenizer_puts_partners_on_the_diagonal():
    """With orthogonal embeddings and a query that copies them, attention finds the equal token."""
    case = make_case((("bpe", 400), ("bpe", 400)), (8, 8))
    same = replace(case.teacher, embeddings=case.student.embeddings)
    attention = CrossModelAttention()
    attention.configure(case.student_space, case.student_space)
    attention.double()
    with torch.no_grad():
        attention.query.weight.copy_(100 * torch.eye(16))
        attention.query.bias.zero_()
    weights = attention(case.student, same)
    assert weights.pair_mass(case.alignment.pairs).mean() > 0.9


@pytest.mark.parametrize("matching", [None, AdversarialMatching(8), ConditionalTransport(8, 4, 5)])
def test_nothing_aligned_is_no_failure(matching):
    case = unaligned(make_case())
    output = case.run(DSKDCrossAttentionObjective(matching=matching))
    assert torch.isfinite(output.loss)
    assert output.metrics["alignment_ratio"].value == 0
    assert all(torch.isfinite(ratio.value) for ratio in output.metrics.values())


def test_matching_adds_its_share():
    case = make_case()
    torch.manual_seed(1)
    plain = DSKDCrossAttentionObjective()
    matched = DSKDCrossAttentionObjective(matching=AdversarialMatching(8, dropout=0.0), kq_ratio=0.3)
    first = case.run(plain)
    case.run(matched)
    matched.load_state_dict(plain.state_dict(), strict=False)
    second = case.run(matched, configure=False)
    torch.testing.assert_close(second.loss, first.loss + 0.5 * 0.3 * second.terms["kq"].total)


def test_wrong_options_are_named():
    with pytest.raises(UserError, match="statistics"):
        CrossModelAttention(statistics="other")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="kq_ratio"):
        DSKDCrossAttentionObjective(kq_ratio=-1)
    with pytest.raises(UserError, match="teacher"):
        DSKDCrossAttentionObjective().configure(make_case().student_space, None)


def overlaps(case: Case, b: int) -> torch.Tensor:
    """Share of each student token's bytes that each teacher token covers, pair by pair."""
    ends = []
    for sequence, end in (
        (case.student.sequence, case.alignment.student_end),
        (case.teacher.sequence, case.alignment.teacher_end),
    ):
        mine = end[sequence == b].tolist()
        ends.append(list(zip([0, *mine[:-1]], mine, strict=True)))
    return torch.tensor(
        [[len(set(range(*s)) & set(range(*t))) / max(1, s[1] - s[0]) for t in ends[1]] for s in ends[0]],
        dtype=torch.float64,
    )


def test_byte_prior_adds_the_overlap_and_decays() -> None:
    case = make_case()
    attention = CrossModelAttention(byte_prior=2.0, byte_prior_steps=4)
    attention.configure(case.student_space, case.teacher_space)
    attention.double()
    plain = CrossModelAttention()
    plain.query = attention.query
    for strength in (2.0, 1.5, 1.0, 0.5, 0.0, 0.0):
        found, without = (a(case.student, case.teacher, case.alignment) for a in (attention, plain))
        for b in range(int(case.student.sequence.max()) + 1):
            i, j = case.student.sequence == b, case.teacher.sequence == b
            n, m = int(i.sum()), int(j.sum())
            prior = strength * (overlaps(case, b) + 1e-3).log()
            scores = without.t2s[b, :n, :m].log() + prior
            torch.testing.assert_close(found.t2s[b, :n, :m], scores.softmax(-1))
            scores = without.s2t[b, :m, :n].log() + prior.T
            torch.testing.assert_close(found.s2t[b, :m, :n], scores.softmax(-1))
    attention.byte_prior_steps = None
    mass = attention(case.student, case.teacher, case.alignment).pair_mass(case.alignment.pairs)
    assert mass.mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_byte_prior_decays_by_whole_steps_to_its_end_in_any_dtype(dtype) -> None:
    case = make_case()
    attention = CrossModelAttention(byte_prior=2.0, byte_prior_steps=1000)
    attention.configure(case.student_space, case.teacher_space)
    attention.to(dtype)
    measure_whole_steps(attention)
    strengths = []
    for _ in range(3):  # micro-batches
        strengths.append(float(attention._strength()))
    settle(attention)
    settle(attention)  # a step that read nothing
    assert [*strengths, float(attention._strength())] == pytest.approx([2.0, 2.0, 2.0, 2.0 * 0.999])
    for _ in range(1000):
        attention._strength()
        settle(attention)
    assert float(attention._strength()) == 0


def test_heads_initialisation_keeps_the_teachers_scale_and_labels_can_stay_out() -> None:
    case = make_case()
    objective = DSKDCrossAttentionObjective(initialization="heads", label_embedding=False)
    objective.configure(case.student_space, case.teacher_space)
    values = objective.attention.teacher_values(case.teacher, False, True)
    torch.testing.assert_close(values, case.teacher.hidden.detach())
    shared, partners = objective._shared_tokens()
    S, T = case.student.head.weight.detach()[shared].T, case.teacher.head.weight.detach()[partners].T
    torch.testing.assert_close(objective.t2s.matrix.detach().T.double(), T @ torch.linalg.pinv(S))
    torch.testing.assert_close(objective.s2t.matrix.detach().T.double(), S @ torch.linalg.pinv(T))
    with_label = objective.attention.teacher_values(case.teacher, True, False)
    without = objective.attention.teacher_values(case.teacher, False, False)
    targets = case.teacher.embeddings[case.teacher.labels]
    torch.testing.assert_close(with_label - without, targets / targets.std())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byte_prior": -1.0}, "byte_prior"),
        ({"byte_prior": 1.0, "byte_prior_steps": 0}, "byte_prior_steps"),
        ({"byte_prior_steps": 10}, "does nothing without a prior"),
    ],
)
def test_impossible_priors_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        CrossModelAttention(**options)
