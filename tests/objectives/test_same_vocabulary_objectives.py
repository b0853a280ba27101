"""SFT, logit KD, DSKD and DSKD v2 against plain formulas in float64, and the mistakes they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jsonargparse
import pytest
import torch
from conftest import make_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from dskd_lightning.errors import UserError
from dskd_lightning.functional import Divergence, ForwardKL, JensenShannon, ReverseKL
from dskd_lightning.objectives.base import Objective, ObjectiveOutput
from dskd_lightning.objectives.dskd import DSKDObjective
from dskd_lightning.objectives.dskd_v2 import DSKDv2Objective
from dskd_lightning.objectives.logit_kd import LogitKDObjective
from dskd_lightning.objectives.sft import SFTObjective
from dskd_lightning.structures import Head, ModelSpace, Side

SMALL, LARGE, VOCAB, N = 5, 8, 23, 12


def make_side(
    hidden_size: int, vocab: int = VOCAB, n: int = N, labels: Tensor | None = None, **head: Any
) -> Side:
    hidden = torch.randn(n, hidden_size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(20, (n,)) if labels is None else labels
    positions = torch.arange(n)
    return Side(hidden, Head(weight, **head), weight, positions, labels, positions // 5)


def make_pair(vocab: int = VOCAB, teacher_vocab: int = VOCAB, **head: Any) -> tuple[Side, Side]:
    student = make_side(SMALL, vocab, **head)
    return student, make_side(LARGE, teacher_vocab, labels=student.labels)


def spaces(student: Side, teacher: Side) -> tuple[ModelSpace, ModelSpace]:
    student_space, teacher_space = (
        ModelSpace(side.head.detach(), side.embeddings) for side in (student, teacher)
    )
    return student_space, teacher_space


def configured(objective: Objective, student: Side, teacher: Side) -> Objective:
    objective.configure(*spaces(student, teacher))
    return objective.double()


def check(output: ObjectiveOutput, loss: Tensor, terms: dict[str, Tensor], leaves: list[Tensor]) -> None:
    torch.testing.assert_close(output.loss, loss)
    for name, value in terms.items():
        torch.testing.assert_close(output.terms[name].total, value.detach())
        assert not output.terms[name].total.requires_grad
    actual = torch.autograd.grad(output.loss, leaves, allow_unused=True)
    expected = torch.autograd.grad(loss, leaves, allow_unused=True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def leaves_of(student: Side, teacher: Side) -> list[Tensor]:
    return [student.hidden, student.head.weight, teacher.hidden, teacher.head.weight]


def share(a: Tensor, b: Tensor) -> Tensor:
    return (a.argmax(-1) == b.argmax(-1)).double().mean()


def check_diagnostics(output: ObjectiveOutput, student: Side, s: Tensor, t: Tensor) -> None:
    values = {name: ratio.value.double() for name, ratio in output.metrics.items()}
    gold = F.one_hot(student.labels, max(s.shape[1], t.shape[1])).double()
    expected = {
        "student_accuracy": share(s, gold),
        "teacher_accuracy": share(t, gold),
        "agreement": share(s, t),
        "student_entropy": torch.distributions.Categorical(logits=s).entropy().mean(),
        "teacher_entropy": torch.distributions.Categorical(logits=t).entropy().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value.detach())
    assert output.tokens == len(student)


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def test_sft() -> None:
    student = make_side(SMALL, bias=torch.randn(VOCAB, dtype=torch.float64), scale=0.5, softcap=3.0)
    output = SFTObjective()(student)
    loss = ce(student.head.logits(student.hidden), student.labels)
    check(output, loss, {"ce": loss}, [student.hidden, student.head.weight])
    assert output.metrics.keys() == {"student_accuracy", "student_entropy"}
    assert not SFTObjective.needs_teacher


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(VOCAB, VOCAB), (VOCAB, VOCAB + 4), (VOCAB + 4, VOCAB)])
def test_logit_kd(vocab: int, teacher_vocab: int) -> None:
    student, teacher = make_pair(vocab, teacher_vocab)
    output = LogitKDObjective(JensenShannon(0.3), kd_ratio=0.2, temperature=1.5)(student, teacher)
    s, t = student.head.logits(student.hidden), teacher.head.logits(teacher.hidden).detach()
    kd = JensenShannon(0.3)(s[:, :VOCAB], t[:, :VOCAB], 1.5).sum()
    terms = {"ce": ce(s, student.labels), "kd": kd}
    leaves = leaves_of(student, teacher)
    check(output, 0.8 * terms["ce"] + 0.2 * kd, terms, leaves)
    if vocab == teacher_vocab:
        check_diagnostics(output, student, s, t)


def naive_dskd(
    student: Side, teacher: Side, t2s: nn.Module, s2t: Any, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    s, t = student.head.logits(student.hidden), teacher.head.detach().logits(teacher.hidden.detach())
    z = student.head.detach().logits(t2s(teacher.hidden.detach()))
    x = teacher.head.detach().logits(s2t(student.hidden))
    return s, t, z, x, ce(z, labels)


def test_dskd_from_the_heads_starts_with_each_models_own_logits() -> None:
    student, teacher = make_pair()
    large = replace(student, head=Head(torch.randn(VOCAB, LARGE, dtype=torch.float64)))
    objective = configured(DSKDObjective(initialization="heads"), large, teacher)
    projected = large.head.logits(objective.t2s(teacher.hidden.detach()))
    solution = torch.linalg.lstsq(large.head.weight, teacher.head.weight).solution
    expected = large.head.weight @ solution @ teacher.hidden.detach().T
    torch.testing.assert_close(projected, expected.T)
    same = ModelSpace(teacher.head.detach(), teacher.embeddings)
    twin = DSKDObjective(initialization="heads")
    twin.configure(same, same)
    for projector in (twin.t2s, twin.s2t):
        torch.testing.assert_close(projector.weight.detach(), torch.eye(LARGE, dtype=torch.float64))
        assert projector.weight.requires_grad
    with pytest.raises(UserError, match="initialization"):
        DSKDObjective(initialization="identity")  # type: ignore[arg-type]


@pytest.mark.parametrize("divergence", [None, ReverseKL()])
def test_dskd(divergence: Divergence | None) -> None:
    student, teacher = make_pair(VOCAB, VOCAB + 3)
    objective = DSKDObjective(divergence, kd_ratio=0.3, temperature=2.0)
    unpadded = replace(teacher, head=teacher.head.restrict(slice(VOCAB)))  # 3 of 23 is more than padding
    objective.configure(*spaces(student, unpadded))
    objective.double()
    output = objective(student, teacher)
    s, t, z, x, t2s_ce = naive_dskd(student, teacher, objective.t2s, objective.s2t, student.labels)
    t2s_kd = (divergence or ForwardKL())(s, z.detach(), 2.0).sum()
    s2t_kd = ForwardKL()(x, t, 2.0).sum()
    terms = {"ce": ce(s, student.labels), "t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t_kd}
    terms["kd"] = t2s_ce + t2s_kd + s2t_kd
    leaves = [*leaves_of(student, teacher), *objective.parameters()]
    check(output, 0.7 * terms["ce"] + 0.3 * terms["kd"], terms, leaves)
    check_diagnostics(output, student, s, t)
    gold = F.one_hot(student.labels, VOCAB + 3)
    for name, (a, b) in {
        "t2s_accuracy": (z, gold), "t2s_agreement": (z, t), "s2t_agreement": (x, s), "s2t_accuracy": (x, gold)
    }.items():  # fmt: skip
        torch.testing.assert_close(output.metrics[name].value.double(), share(a, b))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("topk", [None, 15])
def test_dskd_v2(threshold: float, topk: int | None) -> None:
    student, teacher = make_pair()
    objective = DSKDv2Objective(ReverseKL(), agreement_threshold=threshold, topk_vocab=topk)
    configured(objective, student, teacher)
    rows = slice(topk)
    big, small = teacher.head.weight.detach()[rows].T, student.head.weight.detach()[rows].T
    torch.testing.assert_close(objective.t2s.weight.detach().T, big @ torch.linalg.pinv(small))
    s2t = small @ torch.linalg.pinv(big)
    output = objective(student, teacher)
    t = teacher.head.logits(teacher.hidden)
    s, t, z, x, t2s_ce = naive_dskd(student, teacher, objective.t2s, lambda h: h @ s2t, t.argmax(-1))
    agree = z.argmax(-1) == t.argmax(-1)
    assert 0 < agree.sum() < N
    per_token = ReverseKL()(s, z.detach(), 2.0)
    t2s_kd = (per_token[agree].mean() if agree.double().mean() <= threshold else per_token.mean()) * N
    s2t_kd = ReverseKL()(x, t, 2.0).sum()
    terms = {"ce": ce(s, student.labels), "t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t_kd}
    terms["kd"] = t2s_ce + t2s_kd + s2t_kd
    leaves = [*leaves_of(student, teacher), *objective.parameters()]
    check(output, 0.5 * terms["ce"] + 0.5 * terms["kd"], terms, leaves)
    check_diagnostics(output, student, s, t)
    torch.testing.assert_close(output.metrics["t2s_agreement"].value.double(), agree.double().mean())
    assert set(objective.state_dict()) == {"t2s.weight", "t2s.input_rms"}


def test_dskd_v2_ignores_choices_beyond_the_students_vocabulary() -> None:
    student, teacher = make_pair(VOCAB, VOCAB + 4)
    with torch.no_grad():
        teacher.head.weight[VOCAB:] *= 100
    objective = DSKDv2Objective()
    objective.configure(*spaces(student, replace(teacher, head=teacher.head.restrict(slice(VOCAB)))))
    output = objective.double()(student, teacher)
    outside = teacher.head.logits(teacher.hidden).argmax(-1) >= VOCAB
    assert outside.any()
    assert output.loss.isfinite()


@pytest.mark.parametrize("objective", [SFTObjective, LogitKDObjective, DSKDObjective, DSKDv2Objective])
def test_no_response_tokens(objective: type[Objective]) -> None:
    student, teacher = make_pair()
    made = configured(objective(), student, teacher)

    def empty(side: Side) -> Side:
        return replace(
            side, hidden=side.hidden[:0], labels=side.labels[:0], ids=side.ids[:0], sequence=side.sequence[:0]
        )

    output = made(empty(student), empty(teacher))
    assert output.loss == 0
    assert output.tokens == 0
    output.loss.backward()
    for parameter in (student.hidden, student.head.weight, *made.parameters()):
        assert (parameter.grad == 0).all()
    assert all(ratio.value == 0 for ratio in (output.terms | output.metrics).values())


@pytest.mark.parametrize("objective", [SFTObjective, LogitKDObjective, DSKDObjective])
def test_sums_add_up_over_micro_batches(objective: type[Objective]) -> None:
    student, teacher = make_pair()
    made = configured(objective(), student, teacher)
    whole = made(student, teacher)
    parts = []
    for rows in (slice(0, 3), slice(3, N)):
        part = [
            replace(side, hidden=side.hidden[rows], labels=side.labels[rows], ids=side.ids[rows])
            for side in (student, teacher)
        ]
        parts.append(part)
    outputs = [made(*part) for part in parts]
    torch.testing.assert_close(outputs[0].loss + outputs[1].loss, whole.loss)
    for name, ratio in whole.metrics.items():
        torch.testing.assert_close((outputs[0].metrics[name] + outputs[1].metrics[name]).value, ratio.value)


def test_frozen_head_gets_no_gradient() -> None:
    student, teacher = make_pair()
    student.head.weight.requires_grad_(False)
    objective = configured(DSKDv2Objective(), student, teacher)
    objective(student, teacher).loss.backward()
    assert student.head.weight.grad is None
    assert teacher.head.weight.grad is None
    assert teacher.hidden.grad is None
    assert student.hidden.grad is not None


def test_vocabularies_must_be_one() -> None:
    student, teacher = make_pair(VOCAB, 83)
    for objective in (LogitKDObjective(), DSKDObjective(), DSKDv2Objective()):
        with pytest.raises(UserError, match="student's head has 23 tokens and the teacher's 83"):
            objective.configure(*spaces(student, teacher))
        with pytest.raises(UserError, match="learns from a teacher"):
            objective.configure(spaces(student, teacher)[0], None)


def test_tokenizers_tell_more_than_sizes() -> None:
    student, teacher = (
        replace(space, tokenizer=make_tokenizer("bpe", 300)) for space in spaces(*make_pair(400, 480))
    )
    LogitKDObjective().configure(student, teacher)  # padded heads, one tokenizer
    grown = make_tokenizer("bpe", 300)
    grown.add_tokens(["<extra>"])
    LogitKDObjective().configure(student, replace(teacher, tokenizer=grown))
    grown.add_tokens([f"<extra{index}>" for index in range(40)])
    with pytest.raises(UserError, match="41 tokens of the student"):
        LogitKDObjective().configure(student, replace(teacher, tokenizer=grown))
    other = replace(teacher, tokenizer=make_tokenizer("wordpiece", 300))
    with pytest.raises(UserError, match="to the student and"):
        LogitKDObjective().configure(student, other)


def test_positions_must_correspond() -> None:
    student, teacher = make_pair()
    shorter = replace(teacher, hidden=teacher.hidden[:-1], labels=teacher.labels[:-1])
    with pytest.raises(UserError, match="12 response tokens of the student and 11 of the teacher"):
        LogitKDObjective()(student, shorter)
    with pytest.raises(UserError, match="teacher's side"):
        LogitKDObjective()(student, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_ratio": 1.5}, "kd_ratio"),
        ({"temperature": 0.0}, "temperature"),
        ({"memory_budget_mb": 0.0}, "memory_budget_mb"),
        ({"agreement_threshold": 2.0}, "agreement_threshold"),
        ({"topk_vocab": 0}, "topk_vocab"),
    ],
)
def test_bad_hyperparameters(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DSKDv2Objective(**settings)
    if message == "memory_budget_mb":
        with pytest.raises(UserError, match=message):
            SFTObjective(**settings)


def test_named_in_a_config() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--objective", type=Objective)
    config = parser.parse_object(
        {
            "objective": {
                "class_path": "dskd_lightning.objectives.DSKDObjective",
                "init_args": {
                    "kd_ratio": 0.7,
                    "divergence": {
                        "class_path": "dskd_lightning.functional.JensenShannon",
                        "init_args": {"beta": 0.1},
                    },
                },
            }
        }
    )
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before 4.49
    objective = instantiate(config).objective
    assert isinstance(objective, DSKDObjective)
    assert objective.kd_ratio == 0.7
    assert objective.divergence.beta == 0.1
