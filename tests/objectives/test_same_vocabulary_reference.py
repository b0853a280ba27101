"""Objectives on one vocabulary against the authors' implementations (float32, CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dskd_lightning.functional import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from dskd_lightning.objectives.base import Objective, ObjectiveOutput
from dskd_lightning.objectives.dskd import DSKDObjective
from dskd_lightning.objectives.dskd_v2 import DSKDv2Objective
from dskd_lightning.objectives.logit_kd import LogitKDObjective
from dskd_lightning.structures import Head, ModelSpace, Side

DIVERGENCES: dict[str, type[Divergence]] = {
    "adaptive_kl": AdaptiveKL,
    "forward_kl": ForwardKL,
    "js_divergence": JensenShannon,
    "reverse_kl": ReverseKL,
    "skewed_forward_kl": SkewedForwardKL,
    "skewed_reverse_kl": SkewedReverseKL,
}


def load(folder: Path, file: str, case: str) -> dict[str, Tensor]:
    with safe_open(folder / f"{file}.safetensors", "pt") as tensors:
        names = [name for name in tensors.keys() if name.startswith(case + "/")]  # noqa: SIM118
        return {name[len(case) + 1 :]: tensors.get_tensor(name) for name in names}


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    rtol, atol = (1e-4, 1e-4) if "js_divergence" in name else (1e-4, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def sides(case: dict[str, Tensor]) -> tuple[Side, Side]:
    made = []
    for name in ("student", "teacher"):
        labels = case[f"{name}_labels"]
        response = labels != -100
        made.append(
            Side(
                hidden=case[f"{name}_hidden"][response],
                head=Head(case[f"{name}_head"]),
                embeddings=case[f"{name}_embed"],
                ids=case[f"{name}_input_ids"][response],
                labels=labels[response],
                sequence=response.nonzero()[:, 0],
            )
        )
    return made[0], made[1]


def run(objective: Objective, case: dict[str, Tensor], projectors: dict[str, str]) -> ObjectiveOutput:
    """The objective on a reference case, with ``grad_*`` compared for all leaves."""
    case["student_hidden"].requires_grad_()
    case["student_head"].requires_grad_()
    student, teacher = sides(case)
    objective.configure(
        ModelSpace(Head(case["student_head"].detach()), student.embeddings),
        ModelSpace(Head(case["teacher_head"]), teacher.embeddings),
    )
    parameters = dict(objective.named_parameters())
    assert parameters.keys() == projectors.keys()
    with torch.no_grad():
        for name, key in projectors.items():
            if not isinstance(objective, DSKDv2Objective):
                parameters[name].copy_(case[f"projector.{key}"])
    output = objective(student, teacher)
    (output.loss / output.tokens).backward()
    return output


def compare(output: ObjectiveOutput, case: dict[str, Tensor], name: str, keys: dict[str, str]) -> None:
    close(output.loss.detach() / output.tokens, case["loss"], name)
    for ours, theirs in keys.items():
        values = output.terms | output.metrics
        close(values[ours].value, case[f"log.{theirs}"], name + "/" + ours)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1, 2])
def test_divergence(reference_dir: Path, name: str, temperature: int) -> None:
    inputs = load(reference_dir, "dskd_v1", "divergence")
    case = load(reference_dir, "dskd_v1", f"divergence/{name}/temperature_{temperature}")
    divergence = DIVERGENCES[name]()
    logits = inputs["student_logits"].requires_grad_()
    loss = divergence(logits, inputs["teacher_logits"], temperature)
    loss.sum().backward()
    value, gradient = divergence.value_and_grad(logits, inputs["teacher_logits"], temperature)
    assert logits.grad is not None
    for actual in (loss.detach(), value):
        close(actual, case["loss"], name)
    for actual in (logits.grad, gradient):
        close(actual, case["grad_student_logits"], name)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logit_kd(reference_dir: Path, name: str) -> None:
    case = load(reference_dir, "dskd_v1", f"vanilla_kd/{name}")
    output = run(LogitKDObjective(DIVERGENCES[name]()), case, {})
    compare(output, case, name, {"ce": "nll_loss", "kd": "kd_loss", "student_accuracy": "accuracy"})
    for leaf in ("student_hidden", "student_head"):
        close(case[leaf].grad, case[f"grad_{leaf}"], name)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_dskd(reference_dir: Path, name: str) -> None:
    case = load(reference_dir, "dskd_v1", f"dskd/{name}")
    objective = DSKDObjective(DIVERGENCES[name](), scale_inputs=False)
    projectors = {f"{p}.{part}": f"{p}.0.{part}" for p in ("t2s", "s2t") for part in ("weight", "bias")}
    output = run(objective, case, projectors)
    keys = {term: f"{term}_loss" for term in ("kd", "t2s_ce", "t2s_kd", "s2t_kd")}
    keys |= {"ce": "nll_loss", "student_accuracy": "accuracy", "t2s_accuracy": "t2s_acc"}
    compare(output, case, name, keys | {"s2t_accuracy": "s2t_acc"})
    for leaf in ("student_hidden", "student_head"):
        close(case[leaf].grad, case[f"grad_{leaf}"], name)
    for parameter, key in projectors.items():
        close(objective.get_parameter(parameter).grad, case[f"grad_projector.{key}"], name)


@pytest.mark.parametrize("threshold", [0, 1])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_dskd_v2(reference_dir: Path, name: str, threshold: int) -> None:
    case = load(reference_dir, "dskd_v2", f"dskd_v2/{name}/agreement_{threshold}")
    objective = DSKDv2Objective(DIVERGENCES[name](), agreement_threshold=threshold, scale_inputs=False)
    output = run(objective, case, {"t2s.weight": "t2s.weight"})
    close(objective.t2s.weight.detach(), case["projector.t2s.weight"], name)  # made, not copied
    keys = {term: f"{term}_loss" for term in ("kd", "t2s_ce", "t2s_kd", "s2t_kd")}
    # Not log.accuracy, 0 in all of these cases: student and gold token do agree at some positions.
    keys |= {"ce": "nll_loss", "t2s_accuracy": "t2s_acc"}
    keys |= {key: key for key in ("t2s_agreement", "s2t_agreement")}
    compare(output, case, name, keys | {"teacher_accuracy": "t_acc"})
    for leaf in ("student_hidden", "student_head"):
        close(case[leaf].grad, case[f"grad_{leaf}"], name)
    close(objective.t2s.weight.grad, case["grad_projector.t2s.weight"], name)
