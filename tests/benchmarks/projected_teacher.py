"""Is the projected teacher of token alignment a better teacher than the student needs? The projector alone.

Run: ``python tests/benchmarks/projected_teacher.py --config FILE [FILE ...]``, those of a run across
vocabularies with validation data; its teacher cache is read, and built where it is missing. The projector is
trained on exact pairs of the training set, without the student's body: AdamW, cosine, a tenth of the steps
as warm-up. It learns the teacher's choice, the human token, or the teacher's distribution over the shared
tokens. Then, on pairs of the validation set: cross-entropy of the human token and of the teacher's choice
(nats), how often its choice is the teacher's, KL from the teacher over the shared tokens, and entropy, beside
the student's and the teacher's own. A projected teacher that predicts people's tokens worse than the student
does can't lower its loss on them.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch  # noqa: E402
from _measure import environment, print_table  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from dskd_lightning.functional import token_argmax, token_log_prob  # noqa: E402
from dskd_lightning.launch.configs import config_path  # noqa: E402
from dskd_lightning.launch.lightning_cli import DistillationCLI  # noqa: E402
from dskd_lightning.models.loading import load_model, load_tokenizer  # noqa: E402
from dskd_lightning.models.output import decoder_hidden, model_space, side  # noqa: E402
from dskd_lightning.objectives import DSKDTokenAlignmentObjective  # noqa: E402
from dskd_lightning.objectives._vocabulary import mutual_tokens  # noqa: E402
from dskd_lightning.structures import DistillationBatch, Head, ModelSpace  # noqa: E402
from dskd_lightning.teacher_cache import TeacherCacheSettings, ensure_caches  # noqa: E402

LABELS = {"teacher": "teacher's token", "gold": "human token", "distribution": "teacher's distribution"}
COLUMNS = ("steps", "human token", "on what it learnt", "teacher's token", "same choice", "KL", "entropy")


@dataclass
class Pairs:
    """Exact pairs: hidden states of both, the student's gold token and the teacher's choice in the student's
    vocabulary, -1 where that has no such token."""

    student: Tensor
    teacher: Tensor
    gold: Tensor
    choice: Tensor

    def __len__(self) -> int:
        return len(self.gold)

    def __getitem__(self, rows: Tensor) -> Pairs:
        return Pairs(self.student[rows], self.teacher[rows], self.gold[rows], self.choice[rows])


class Study:
    """The two heads and their shared tokens."""

    def __init__(self, student: ModelSpace, teacher: ModelSpace) -> None:
        self.student, self.teacher = student, teacher
        self.objective = DSKDTokenAlignmentObjective()
        self.objective.configure(student, teacher)
        to_teacher, to_student = self.objective.student_to_teacher, self.objective.teacher_to_student
        assert to_teacher is not None
        assert to_student is not None
        self.to_student = to_student
        self.shared = mutual_tokens(to_teacher, to_student)
        self.partners = to_teacher[self.shared]

    @torch.no_grad()
    def pairs(self, batches: Iterable[DistillationBatch], model: torch.nn.Module | None) -> Pairs:
        """Of all batches; without a ``model`` no states of the student."""
        found = []
        for batch in batches:
            alignment, hidden = batch.alignments[0], batch.teacher_hidden[0]
            assert alignment is not None
            assert isinstance(hidden, Tensor)
            i, j = alignment.pairs.unbind(1)
            own = torch.zeros(len(i), 0)
            if model is not None:
                own = side(model, decoder_hidden(model, batch.student), batch.student).hidden[i]  # type: ignore[arg-type]
            read = hidden[j].to(self.teacher.head.weight.dtype)
            choice = self.to_student[token_argmax(read, self.teacher.head)]
            found.append((own, read, batch.student.select(batch.student.labels)[i], choice))
        return Pairs(*(torch.cat(part) for part in zip(*found, strict=True)))

    def train(
        self, pairs: Pairs, labels: str, rate: float, steps: int, rows: int, marks: Sequence[int]
    ) -> Iterable[tuple[int, torch.nn.Module]]:
        """A projector after each of ``marks`` steps, from the heads' initialisation; see `LABELS`."""
        projector, generator = copy.deepcopy(self.objective.t2s).train(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(projector.parameters(), rate, weight_decay=0.01)
        targets = pairs.choice if labels == "teacher" else pairs.gold  # the latter are all known
        known = torch.nonzero(targets >= 0).squeeze(1)
        head = self.student.head.detach()
        for step in range(steps):
            warm = min(1.0, (step + 1) / max(1.0, 0.1 * steps))
            optimizer.param_groups[0]["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
            chosen = known[torch.randint(len(known), (rows,), generator=generator)]
            hidden = projector(pairs.teacher[chosen])
            if labels == "distribution":
                with torch.no_grad():
                    p = self.teacher.head.logits(pairs.teacher[chosen]).float()[:, self.partners].softmax(-1)
                loss = -(p * head.logits(hidden)[:, self.shared].log_softmax(-1)).sum(-1).mean()
            else:
                loss = -token_log_prob(hidden, head, targets[chosen]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimizer.step()
            if step + 1 in marks:
                yield step + 1, projector

    @torch.no_grad()
    def row(
        self, pairs: Pairs, hidden: Tensor, head: Head, learnt: tuple[Tensor, Tensor] | None
    ) -> list[str]:
        """What ``head`` says of ``hidden``; ``learnt`` are hidden states and gold tokens of training."""
        human = -float(token_log_prob(hidden, head, pairs.gold).mean())
        known = pairs.choice >= 0
        choice = -float(token_log_prob(hidden[known], head, pairs.choice[known]).mean())
        same = float((token_argmax(hidden, head) == pairs.choice)[known].float().mean())
        kl, entropy = self._distribution(pairs, hidden, head)
        seen = "" if learnt is None else f"{-float(token_log_prob(learnt[0], head, learnt[1]).mean()):.2f}"
        return [f"{human:.2f}", seen, f"{choice:.2f}", f"{same:.1%}", f"{kl:.2f}", f"{entropy:.2f}"]

    def own_row(self, pairs: Pairs) -> list[str]:
        """The teacher's, of human tokens that it has."""
        back = torch.full((self.student.head.vocab_size,), -1).index_put((self.shared,), self.partners)
        labels = back[pairs.gold]
        known = labels >= 0
        human = -float(token_log_prob(pairs.teacher[known], self.teacher.head, labels[known]).mean())
        return [f"{human:.2f}", "", "", "", "", ""]

    def _distribution(self, pairs: Pairs, hidden: Tensor, head: Head) -> tuple[float, float]:
        kl = entropy = 0.0
        for own, read in zip(hidden.split(100), pairs.teacher.split(100), strict=True):
            logits = head.logits(own).float()
            whole = logits.log_softmax(-1)
            entropy -= float((whole.exp() * whole).sum())
            q = logits[:, self.shared].log_softmax(-1)
            p = self.teacher.head.logits(read).float()[:, self.partners].log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
        return kl / len(hidden), entropy / len(hidden)


def table(study: Study, train: Pairs, held: Pairs, a: argparse.Namespace) -> list[list[str]]:
    """Rows of student, teacher, and the projector at each learning rate and labels."""
    head, some = study.student.head.detach(), train[torch.arange(min(len(train), len(held)))]

    def projected(projector: torch.nn.Module) -> list[str]:
        with torch.no_grad():
            seen = projector(some.teacher), some.gold
            return study.row(held, projector(held.teacher), head, seen)

    rows = [
        ["student", "", *study.row(held, held.student, head, None)],
        ["teacher", "", *study.own_row(held)],
    ]
    rows.append(["projected, untrained", "0", *projected(study.objective.t2s.eval())])
    marks = [max(1, a.steps // 4), a.steps]
    for labels in a.labels:
        for rate in a.rates:
            for step, projector in study.train(train, labels, rate, a.steps, a.rows, marks):
                rows.append([f"{LABELS[labels]}, {rate:g}", str(step), *projected(projector)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-4])
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=200, help="pairs of a step")
    parser.add_argument("--held", type=int, default=800, help="pairs of the validation set to measure on")
    a = parser.parse_args()
    words = [word for file in a.config for word in ("--config", str(config_path(file)))]
    run = DistillationCLI(run=False, args=[*words, "--trainer.logger=false"])
    data, spec = run.datamodule, run.model.teacher_specs[0]
    settings = data.teacher_cache or TeacherCacheSettings()
    (teacher,) = ensure_caches(data, [spec], ("train", "val"), settings) or []
    student = load_model(run.model.student_spec)
    frozen = cast("PreTrainedModel", teacher)
    study = Study(
        model_space(student, load_tokenizer(run.model.student_spec)),
        model_space(frozen, load_tokenizer(spec)),
    )
    held = study.pairs(data.val_dataloader(), student)
    held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[: a.held]]
    train = study.pairs(data.train_dataloader(), None)
    print(f"{len(train):,} pairs to learn from, {len(held)} to measure on\n{environment()}")
    print_table("The projected teacher", ("who", *COLUMNS), table(study, train, held, a))


if __name__ == "__main__":
    main()
