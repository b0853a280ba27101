"""Objectives over aligned positions against formulas written example by example in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from cross_tokenizer_cases import Case, make_case, one_example, unaligned
from safetensors.torch import load_file
from torch.nn import functional as F

from dskd_lightning.errors import UserError
from dskd_lightning.functional import ForwardKL, ReverseKL, forward_kl
from dskd_lightning.objectives._vocabulary import (
    exact_maps,
    extension_ranges,
    sparse_projection,
    token_strings,
)
from dskd_lightning.objectives.alm import ALMObjective, bernoulli_kl
from dskd_lightning.objectives.dskd_eta import DSKDTokenAlignmentObjective
from dskd_lightning.objectives.gold import GOLDObjective
from dskd_lightning.objectives.min_edit import MinEditObjective
from dskd_lightning.objectives.shared_vocabulary import SharedVocabularyObjective
from dskd_lightning.objectives.uld import ULDObjective
from dskd_lightning.objectives.xtoken import XTokenHybridObjective, XTokenProjectionObjective
from dskd_lightning.structures import Head, ModelSpace, Side

OBJECTIVES = {
    "uld": lambda **k: ULDObjective(**k),
    "shared": lambda **k: SharedVocabularyObjective(**k),
    "shared_rkl": lambda **k: SharedVocabularyObjective(ReverseKL(), **k),
    "gold": lambda **k: GOLDObjective(**k),
    "gold_overlap": lambda **k: GOLDObjective(
        temperature=1.5, beta=0.0, matched_weight=None, unmatched_weight=None, skip_eos=True, **k
    ),
    "projection": lambda **k: XTokenProjectionObjective(**k),
    "hybrid": lambda **k: XTokenHybridObjective(**k),
    "min_edit": lambda **k: MinEditObjective(**k),
    "min_edit_bytes": lambda **k: MinEditObjective(alignment="bytes", **k),
    "alm": lambda **k: ALMObjective(**k),
    "alm_all": lambda **k: ALMObjective(divergence="log_difference", bias_threshold=None, weight=3.0, **k),
    "eta": lambda **k: DSKDTokenAlignmentObjective(**k),
    "eta_all": lambda **k: DSKDTokenAlignmentObjective(agreement_threshold=0.0, **k),
    "eta_boundaries": lambda **k: DSKDTokenAlignmentObjective(positions="boundaries", **k),
    "eta_distribution": lambda **k: DSKDTokenAlignmentObjective(projector_learns="distribution", **k),
}
PARAMETERS = pytest.mark.parametrize("name", OBJECTIVES)


def groups(case: Case):
    """``(student positions, teacher positions)`` of each group."""
    a = case.alignment
    for group in range(a.groups):
        yield [
            [p for p, g in enumerate(side.tolist()) if g == group]
            for side in (a.student_group, a.teacher_group)
        ]


def logits(case: Case):
    return (
        case.student.hidden @ case.student.head.weight.T,
        case.teacher.hidden @ case.teacher.head.weight.T,
    )


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0)


def padded_l1(p, q):
    p, q = p.sort(descending=True).values, q.sort(descending=True).values
    size = max(len(p), len(q))
    return (F.pad(p, (0, size - len(p))) - F.pad(q, (0, size - len(q)))).abs().sum()


def kd_uld(case, o):
    s, t = logits(case)
    total = s.sum() * 0
    for b in range(3):
        i, j = (side.sequence == b for side in (case.student, case.teacher))
        for p, q in zip(t[j].softmax(-1), s[i].softmax(-1), strict=False):
            total = total + padded_l1(p, q)
    return total


def kd_shared(case, o):
    s, t = logits(case)
    back = o.teacher_to_student
    match = [(i, int(j)) for i, j in enumerate(o.student_to_teacher) if j >= 0 and back[j] == i]
    ids_s, ids_t = ([pair[k] for pair in match] for k in (0, 1))
    total = s.sum() * 0
    for i, j in case.alignment.pairs.tolist():
        p, q = (t[j][ids_t] / 2).softmax(-1), (s[i][ids_s] / 2).softmax(-1)
        total = total + (kl(p, q) if isinstance(o.divergence, ForwardKL) else kl(q, p))
    return total


def hybrid(case, o, match, matched_kd):
    s, t = (x / o.temperature for x in logits(case))
    lp_s, lp_t = s.log_softmax(-1), t.log_softmax(-1)
    eos = case.student_space.tokenizer.eos_token_id
    overlap = sum(j >= 0 for j in match) / len(match)
    weights = (o.matched_weight, o.unmatched_weight)
    w = [default if x is None else x for x, default in zip(weights, (overlap, 1 - overlap), strict=True)]
    total = s.sum() * 0
    for i, j in groups(case):
        if o.skip_eos and case.student.labels[i[0]] == eos:
            continue
        q, p = lp_s[i[0]].exp(), lp_t[j[0]].exp()
        for later in i[1:]:
            q = q * lp_s[later, case.student.labels[later]].exp()
        for later in j[1:]:
            p = p * lp_t[later, case.teacher.labels[later]].exp()
        targets = sorted({x for x in match if x >= 0})
        p_matched = p[targets]
        q_matched = torch.stack([q[[k for k, x in enumerate(match) if x == y]].sum() for y in targets])
        rest_q = q[[k for k, x in enumerate(match) if x < 0]]
        rest_p = p[[k for k in range(len(p)) if k not in set(targets)]]
        total = total + w[0] * matched_kd(p_matched, q_matched) + w[1] * padded_l1(rest_p, rest_q)
    return total


def kd_gold(case, o):
    def jsd(p, q):
        m = (p + q) / 2
        return 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum()

    def fkl(p, q):
        return (p * (p / q).log()).sum()

    return hybrid(case, o, o.student_to_teacher.tolist(), jsd if o.beta == 0.5 else fkl)


def matrix(case, o):
    rows, columns, weights = sparse_projection(case.student_space, case.teacher_space)
    dense = torch.zeros(case.student_space.vocab_size, case.teacher_space.vocab_size, dtype=torch.float64)
    dense[rows, columns] = weights.double()
    return dense


def kd_projection(case, o):
    s, t = logits(case)
    w = matrix(case, o)
    reached = w.sum(0) > 0
    total = s.sum() * 0
    for i, j in groups(case):
        q = (s[i[0]].softmax(-1) @ w)[reached]
        p = t[j[0]].softmax(-1)[reached]
        total = total + kl(p / p.sum(), q / q.sum())
    return total


def kd_hybrid(case, o):
    best, top = matrix(case, o).max(1)
    match = torch.where(best >= 0.6, top, -1).tolist()
    assert sum(m >= 0 for m in match) > sum(m >= 0 for m in o.student_to_teacher.tolist())
    return hybrid(case, o, match, lambda p, q: (p * (p / q).log()).sum())


def kd_min_edit(case, o):
    s, t = (x / 2 for x in logits(case))
    nearest = o.nearest.tolist()
    partner = dict(case.alignment.pairs.tolist())
    if o.alignment == "edit_distance":
        partner = {
            i: j for i, j in enumerate(o._edit_positions(case.student, case.teacher).tolist()) if j >= 0
        }
    total, used = s.sum() * 0, 0
    for i, gold in enumerate(case.student.labels.tolist()):
        q = s[i].softmax(-1)
        if i in partner and nearest[case.teacher.labels[partner[i]]] == gold:
            p = [0.0] * len(q)
            for token, mass in enumerate(t[partner[i]].softmax(-1)):
                if nearest[token] >= 0:
                    p[nearest[token]] += mass
            scale = sum(p)
            total, used = total + kl([x / scale for x in p], q), used + 1
        else:
            total = total - q[gold].log()
    assert 5 < used < len(s)
    return total


def kd_alm(case, o):
    s, t = (x.log_softmax(-1) for x in logits(case))
    sides = (case.student, case.teacher)
    strings = [token_strings(space) for space in (case.student_space, case.teacher_space)]
    special = [set(space.tokenizer.all_special_ids) for space in (case.student_space, case.teacher_space)]
    total, kept = s.sum() * 0, 0
    for group in groups(case):
        logs, biased = [], False
        for rows, lp, side, text, skip in zip(group, (s, t), sides, strings, special, strict=True):
            logs.append(sum(lp[r, side.labels[r]] for r in rows) / o.temperature)
            label = int(side.labels[rows[-1]])
            if o.bias_threshold is not None and label not in skip:
                p = lp[rows[-1]].exp()
                u = text[label]
                longer = sum(
                    p[k] for k, x in enumerate(text) if k not in skip and x.startswith(u) and len(x) > len(u)
                )
                biased |= bool(longer / (longer + p[label]) > o.bias_threshold)
        if biased:
            continue
        kept += 1
        q, p = (x.exp() for x in logs)
        if o.divergence == "log_difference":
            total = total + (logs[1] - logs[0]).abs()
        else:
            total = total + p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    if o.bias_threshold is not None:
        assert 0 < kept < case.alignment.groups
    return o.weight * o.temperature * total


def kd_eta(case, o):
    s, t = logits(case)
    n = len(s)
    t2s_map = o.teacher_to_student.tolist()
    shared = [(i, int(j)) for i, j in enumerate(o.student_to_teacher) if j >= 0 and t2s_map[j] == i]
    S = case.student.head.weight.detach()[[i for i, _ in shared]].T
    T = case.teacher.head.weight[[j for _, j in shared]].T
    torch.testing.assert_close(o.t2s.matrix.T, T @ torch.linalg.pinv(S))
    used = []
    places = case.alignment.pairs.tolist()
    if o.positions == "boundaries":
        places = [(i[0], j[0]) for i, j in groups(case)]
        assert len(places) > len(case.alignment.pairs)
    for i, j in places:
        label = t2s_map[int(t[j].argmax())]
        if label >= 0:
            used.append((i, j, label))
    ce, kd, back = [], [], []
    for i, j, label in used:
        z = o.t2s(case.teacher.hidden[j]) @ case.student.head.weight.detach().T
        ce.append(-z.log_softmax(-1)[label])
        kd.append((int(z.argmax()) == label, forward_kl(s[i], z.detach(), 2.0)))
        moved = case.student.hidden[i] @ S @ torch.linalg.pinv(T) @ case.teacher.head.weight.T
        back.append(forward_kl(moved, t[j], 2.0))
    agreeing = [value for hit, value in kd if hit]
    assert 0 < len(agreeing) < len(kd)
    if o.projector_learns == "distribution":
        ce = []
        for i, j in places:
            z = o.t2s(case.teacher.hidden[j]) @ case.student.head.weight.detach()[[i for i, _ in shared]].T
            p = t[j][[j for _, j in shared]].softmax(-1)
            ce.append(-(p * z.log_softmax(-1)).sum())
        assert len(ce) > len(kd)
    chosen = agreeing if len(agreeing) / len(kd) <= o.agreement_threshold else [v for _, v in kd]
    return n * sum(sum(part) / len(part) for part in (ce, chosen, back))


NAIVE = {
    "uld": kd_uld,
    "shared": kd_shared,
    "shared_rkl": kd_shared,
    "gold": kd_gold,
    "gold_overlap": kd_gold,
    "projection": kd_projection,
    "hybrid": kd_hybrid,
    "min_edit": kd_min_edit,
    "min_edit_bytes": kd_min_edit,
    "alm": kd_alm,
    "alm_all": kd_alm,
    "eta": kd_eta,
    "eta_all": kd_eta,
    "eta_boundaries": kd_eta,
    "eta_distribution": kd_eta,
}


def related_heads() -> Case:
    """A student whose head is the teacher's on shared tokens, in a larger space: argmaxes agree."""
    case = make_case(dims=(10, 6))
    shared = exact_maps(case.student_space, case.teacher_space)[0]
    ids = (shared >= 0).nonzero()[:, 0]
    weight = case.student.head.weight.detach().clone()
    weight[ids] = case.teacher.head.weight[shared[ids]] @ torch.randn(6, 10, dtype=torch.float64)
    weight[ids[::2]] += 0.3 * torch.randn(len(ids[::2]), 10, dtype=torch.float64)
    space = replace(case.student_space, head=Head(weight.clone()))
    student = replace(case.student, head=Head(weight.requires_grad_()))
    return replace(case, student=student, student_space=space)


@PARAMETERS
@pytest.mark.parametrize("memory_budget_mb", [0.001, 1024])
def test_matches_the_formula(name, memory_budget_mb):
    case = related_heads() if name.startswith("eta") else make_case()
    objective = OBJECTIVES[name](memory_budget_mb=memory_budget_mb)
    output = case.run(objective)
    ce = F.cross_entropy(logits(case)[0], case.student.labels, reduction="sum")
    kd = NAIVE[name](case, objective)
    torch.testing.assert_close(output.terms["kd"].total, kd.detach())
    torch.testing.assert_close(output.terms["ce"].total, ce.detach())
    expected = 0.5 * ce + 0.5 * kd
    torch.testing.assert_close(output.loss, expected)
    parameters = list(objective.parameters())
    ours, theirs = case.gradients(output.loss, *parameters), case.gradients(expected, *parameters)
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, wanted)


@PARAMETERS
def test_metrics_and_flags(name):
    case = make_case()
    objective = OBJECTIVES[name](kd_ratio=0.25)
    output = case.run(objective)
    a, n = case.alignment, len(case.student)
    assert not objective.needs_padded_statistics
    assert int(output.tokens) == n
    assert output.metrics["alignment_ratio"].value.item() == pytest.approx(len(a.pairs) / n)
    known = (objective.student_to_teacher[case.student.labels] >= 0).double().mean()
    assert output.metrics["vocabulary_coverage"].value.item() == pytest.approx(known.item())
    assert output.metrics["unaligned_examples"].value == 0
    assert {"agreement", "teacher_accuracy", "teacher_entropy", "student_accuracy", "student_entropy"} <= set(
        output.metrics
    )
    hits = (logits(case)[0].argmax(-1) == case.student.labels).double().mean()
    assert output.metrics["student_accuracy"].value.item() == pytest.approx(hits.item())
    parts = 0.75 * output.terms["ce"].total + 0.25 * output.terms["kd"].total
    torch.testing.assert_close(output.loss.detach(), parts)
    assert not objective.state_dict().keys() - {"t2s.weight", "t2s.input_rms"}


@PARAMETERS
def test_nothing_aligned_leaves_cross_entropy(name):
    case = unaligned(make_case())
    objective = OBJECTIVES[name]()
    output = case.run(objective)
    ce = F.cross_entropy(logits(case)[0], case.student.labels, reduction="sum")
    assert all(torch.isfinite(ratio.value) for ratio in output.metrics.values())
    assert all(torch.isfinite(g).all() for g in case.gradients(output.loss))
    if name not in ("uld", "min_edit", "min_edit_bytes"):
        torch.testing.assert_close(output.loss, 0.5 * ce)
        assert output.metrics["unaligned_examples"].value == 1
        assert output.terms["kd"].total == 0


@PARAMETERS
def test_one_unaligned_example_is_counted(name):
    case = make_case()
    a = case.alignment
    drop_s, drop_t = (side.sequence == 1 for side in (case.student, case.teacher))
    kept = ~drop_s[a.pairs[:, 0]]
    # Renumber the groups that are left.
    left = torch.full((a.groups + 1,), -1)
    alive = a.student_group[(~drop_s) & (a.student_group >= 0)].unique()
    left[alive] = torch.arange(len(alive))
    part = replace(
        a,
        student_group=left[a.student_group].masked_fill(drop_s, -1),
        teacher_group=left[a.teacher_group].masked_fill(drop_t, -1),
        pairs=a.pairs[kept],
        groups=len(alive),
    )
    output = replace(case, alignment=part).run(OBJECTIVES[name]())
    assert torch.isfinite(output.loss)
    if name not in ("uld", "min_edit"):
        count = output.metrics["unaligned_examples"]
        assert (int(count.total), int(count.count)) == (1, 3)


def test_uld_matches_published_numbers(reference_dir):
    stored = load_file(reference_dir / "dskd_v1.safetensors")
    case = {key[4:]: value for key, value in stored.items() if key.startswith("uld/")}
    hidden, weight = case["student_hidden"].requires_grad_(), case["student_head"].requires_grad_()
    sides = []
    for name, h, w in (
        ("student", hidden, weight),
        ("teacher", case["teacher_hidden"], case["teacher_head"]),
    ):
        keep = case[f"{name}_labels"] != -100
        ids, labels = case[f"{name}_input_ids"][keep], case[f"{name}_labels"][keep]
        sides.append(Side(h[keep], Head(w), case[f"{name}_embed"], ids, labels, keep.nonzero()[:, 0]))
    objective = ULDObjective(memory_budget_mb=0.001)
    spaces = [ModelSpace(side.head, side.embeddings) for side in sides]
    objective.configure(*spaces)
    output = objective(*sides)
    loss = output.loss / output.tokens
    loss.backward()
    for actual, expected in (
        (loss.detach(), case["loss"]),
        (output.terms["ce"].value, case["log.nll_loss"]),
        (output.terms["kd"].value, case["log.uld_loss"]),
        (output.metrics["student_accuracy"].value, case["log.accuracy"]),
        (hidden.grad, case["grad_student_hidden"]),
        (weight.grad, case["grad_student_head"]),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["shared", "gold", "projection", "hybrid", "min_edit_bytes"])
def test_one_tokenizer_reduces_to_same_vocabulary(name):
    """Equal tokenizers: a divergence over the vocabulary without special and unused ids."""
    case = make_case((("bpe", 400), ("bpe", 400)))
    objective = OBJECTIVES[name](temperature=1.0)
    with_alignment = case.run(objective)
    without = objective(case.student, case.teacher, None)
    torch.testing.assert_close(with_alignment.loss, without.loss)
    assert with_alignment.metrics["alignment_ratio"].value == 1
    s, t = logits(case)
    ids = (objective.student_to_teacher >= 0).nonzero()[:, 0]
    assert torch.equal(objective.student_to_teacher[ids], ids)
    if name in ("shared", "projection"):
        expected = forward_kl(s[:, ids], t[:, ids]).sum()
        torch.testing.assert_close(with_alignment.terms["kd"].total, expected.detach())


@PARAMETERS
def test_the_same_model_on_both_sides_has_no_distance(name):
    """Student and teacher equal in tokenizer, hidden states and head: no KD but for labels."""
    case = make_case((("bpe", 400), ("bpe", 400)), (6, 6))
    teacher = replace(case.student, hidden=case.student.hidden.detach(), head=case.student.head.detach())
    case = replace(case, teacher=teacher, teacher_space=copy.copy(case.student_space))
    output = case.run(OBJECTIVES[name]())
    if name.startswith("eta"):
        assert output.terms["t2s_kd"].total < 1e-6
        assert output.terms["s2t_kd"].total < 1e-6
    elif not name.startswith("min_edit"):
        assert output.terms["kd"].total.abs() < 1e-6


def test_missing_tokenizers_and_strangers_are_named():
    case = make_case()
    bare = ModelSpace(case.teacher_space.head, case.teacher_space.embeddings)
    for name in OBJECTIVES:
        if name in ("uld", "alm_all"):
            OBJECTIVES[name]().configure(case.student_space, bare)
            continue
        with pytest.raises(UserError, match="tokenizer"):
            OBJECTIVES[name]().configure(case.student_space, bare)
    objective = OBJECTIVES["shared"]()
    case.run(objective)
    with pytest.raises(ValueError, match="alignment"):
        objective(case.student, case.teacher, None)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SharedVocabularyObjective(kd_ratio=2), "kd_ratio"),
        (lambda: ULDObjective(temperature=0), "temperature"),
        (lambda: ULDObjective(memory_budget_mb=0), "memory_budget_mb"),
        (lambda: GOLDObjective(beta=-1), "beta"),
        (lambda: ALMObjective(divergence="x"), "divergence"),  # type: ignore[arg-type]
        (lambda: ALMObjective(bias_threshold=3), "bias_threshold"),
        (lambda: MinEditObjective(alignment="x"), "alignment"),  # type: ignore[arg-type]
        (lambda: XTokenHybridObjective(min_weight=0), "min_weight"),
        (lambda: DSKDTokenAlignmentObjective(topk_vocab=0), "topk_vocab"),
        (lambda: DSKDTokenAlignmentObjective(projector_learns="labels"), "projector_learns"),
        (lambda: DSKDTokenAlignmentObjective(agreement_threshold=2), "agreement_threshold"),
        (lambda: DSKDTokenAlignmentObjective(positions="x"), "positions"),  # type: ignore[arg-type]
    ],
)
def test_wrong_options_are_named(make, match):
    with pytest.raises(UserError, match=match):
        make()


def test_bernoulli_kl_gradient_and_certainty():
    log_p = -torch.rand(5, dtype=torch.float64) / 100
    log_q = (-torch.rand(5, dtype=torch.float64) / 100).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bernoulli_kl(log_p=log_p, log_q=x), log_q)
    certain = torch.zeros(2, requires_grad=True)
    value = bernoulli_kl(log_p=torch.zeros(2), log_q=certain)
    value.sum().backward()
    assert torch.equal(value.detach(), torch.zeros(2))
    assert torch.isfinite(certain.grad).all()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not name.startswith("eta")])
def test_losses_are_sums_over_examples(name):
    """A batch of three gives what its examples give one by one: accumulation changes nothing."""
    case = make_case()
    objective = OBJECTIVES[name]()
    whole = case.run(objective)
    parts = [one_example(case, b).run(objective, configure=False) for b in range(3)]
    torch.testing.assert_close(whole.loss, sum(part.loss for part in parts))
    assert int(whole.tokens) == sum(int(part.tokens) for part in parts)
    for key, ratio in whole.metrics.items():
        total = sum(part.metrics[key].total for part in parts)
        torch.testing.assert_close(ratio.total.double(), torch.as_tensor(total).double(), msg=key)


@PARAMETERS
def test_frozen_bfloat16_models(name):
    """LoRA training: heads without gradient, weights in half precision."""
    case = make_case()
    half = []
    for side in (case.student, case.teacher):
        head = Head(side.head.weight.detach().bfloat16())
        hidden = side.hidden.detach().bfloat16().requires_grad_(side is case.student)
        half.append(replace(side, head=head, hidden=hidden, embeddings=side.embeddings.bfloat16()))
    spaces = [
        replace(s, head=x.head, embeddings=x.embeddings)
        for s, x in zip((case.student_space, case.teacher_space), half, strict=True)
    ]
    objective = OBJECTIVES[name]()
    objective.configure(*spaces)
    output = objective(half[0], half[1], case.alignment)
    (gradient,) = torch.autograd.grad(output.loss, half[0].hidden)
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    exact = case.run(OBJECTIVES[name]())
    torch.testing.assert_close(output.loss.double(), exact.loss, rtol=0.3, atol=1.0)


def test_nearest_tokens_are_kept_on_disk(tmp_path):
    case = make_case()
    first, second = (MinEditObjective(cache_dir=str(tmp_path)) for _ in range(2))
    a, b = case.run(first), case.run(second)
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(a.loss, b.loss)
    assert len(first._partners) == 3
    case.run(first, configure=False)
    assert len(first._partners) == 3


def test_long_extensions_of_a_token_are_found():
    space = make_case().student_space
    order, first, last = extension_ranges(space)
    strings, special = token_strings(space), set(space.tokenizer.all_special_ids)
    for index, text in enumerate(strings):
        if index in special or not text:
            assert first[index] == last[index]
            continue
        expected = {
            k
            for k, other in enumerate(strings)
            if k not in special and other.startswith(text) and len(other) > len(text)
        }
        assert set(order[first[index] : last[index]].tolist()) == expected
