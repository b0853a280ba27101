"""Foreign modules, subclasses, loops, Fabric and fp16 take the very steps that whole batches give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch
from forked_ranks import in_ranks
from lightning.pytorch.plugins.precision import MixedPrecision
from reuse_in_own_module import Mine
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

import dskd_lightning as dl
from dskd_lightning.training.whole_steps import settle_before_steps
from dskd_lightning.training.windows import windows

ROWS = [{"prompt": f"Say {n}.", "response": "one two " * (1 + 5 * (n % 7))} for n in range(30)]
STEP = 12
"""Rows of an optimiser step: three batches of four, or of two on two ranks; the last step has six."""

Model = tuple[dl.Loaded, dl.Loaded]
State = dict[str, torch.Tensor]


class WithPenalty(dl.DistillationModule):
    """A foreign project's: another term, and hooks that are its own."""

    def training_step(self, batch: dl.DistillationBatch, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + penalty(self.student)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Free for whoever subclasses."""


def penalty(student) -> torch.Tensor:
    return 0.1 * student.lm_head.weight.square().mean()


@pytest.fixture(scope="module")
def make(model_folder) -> Callable[[str], tuple[L.LightningModule, dl.DistillationCollator]]:
    """``make(kind)`` -> a module of fresh models, always the same weights, and its collator."""
    folders = model_folder(seed=1), model_folder(hidden=24, seed=2)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])

    def made(kind: str) -> tuple[L.LightningModule, dl.DistillationCollator]:
        student, teacher = (dl.Loaded(copy.deepcopy(model), tokenizer) for model in models)
        collator = dl.DistillationCollator(student, teacher)
        torch.manual_seed(0)  # the projectors' first weights
        if kind == "foreign":
            return Mine(student, teacher), collator
        module = (WithPenalty if kind == "subclass" else dl.DistillationModule)(
            student, dl.DSKDObjective(temperature=2.0), teacher, lambda p: torch.optim.SGD(p, lr=0.1),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0), projector_lr=None,
        )  # fmt: skip
        module.configure_model()
        return module, collator

    return made


def rows_of(kind: str) -> list[dict[str, str]]:
    """Lightning divides a subclass's term by the whole number of batches of a shorter last step, too."""
    return ROWS[:24] if kind == "subclass" else ROWS


@pytest.fixture(scope="module")
def by_hand(make) -> dict[str, State]:
    """What every way must give: each step in one batch, its loss divided by its tokens."""
    states = {}
    for kind in ("foreign", "subclass", "own"):
        module, collator = make(kind)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        rows = rows_of(kind)
        for start in range(0, len(rows), STEP):
            batch = collator(rows[start : start + STEP])
            if kind == "foreign":
                sides = (
                    module.side(m, t)
                    for m, t in ((module.student, batch.student), (module.teacher, batch.teachers[0]))
                )
                output = module.objective(*sides)
            else:
                output = module.distil(batch)
            loss = output.loss / output.tokens
            (loss + penalty(module.student) if kind == "subclass" else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        states[kind] = state(module)
    return states


def state(module: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def fit(made, kind: str, batch_size: int, rank: int | None = None, **options) -> State:
    module, collator = made
    rows = rows_of(kind)
    sampler = None if rank is None else DistributedSampler(rows, 2, rank, shuffle=False)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, accumulate_grad_batches=3, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size, sampler=sampler, collate_fn=collator))
    return state(module)


def loop(made) -> State:
    """Without Lightning's help."""
    module, collator = made
    optimizer = module.configure_optimizers()
    if isinstance(optimizer, dict):
        optimizer = optimizer["optimizer"]
    else:
        settle_before_steps(optimizer, module.objective)
    for window in windows(DataLoader(ROWS, batch_size=4, collate_fn=collator), 3):
        for number, batch in enumerate(window):
            module.training_step(batch, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(module)


def with_fabric(made, batch_size: int, **options) -> State:
    module, collator = made
    fabric = L.Fabric(accelerator="cpu", **options)
    fabric.launch()
    wrapped, optimizer = fabric.setup(module, module.configure_optimizers()["optimizer"])
    loader = fabric.setup_dataloaders(DataLoader(ROWS, batch_size=batch_size, collate_fn=collator))
    for window in windows(loader, 3):
        for number, batch in enumerate(window):
            with fabric.no_backward_sync(wrapped, enabled=number < len(window) - 1):
                fabric.backward(wrapped.training_step(batch, number))
        optimizer.step()
        optimizer.zero_grad()
    return state(module)


@pytest.mark.parametrize("kind", ["foreign", "subclass", "own"])
def test_accumulated_batches_are_one_step(make, by_hand, kind) -> None:
    assert_same(fit(make(kind), kind, 4), by_hand[kind])


@pytest.mark.parametrize("kind", ["foreign", "own"])
def test_plain_loop(make, by_hand, kind) -> None:
    assert_same(loop(make(kind)), by_hand[kind])


def test_fabric(make, by_hand) -> None:
    assert_same(with_fabric(make("own"), 4, devices=1), by_hand["own"])


@pytest.mark.parametrize("kind", ["foreign", "subclass"])
def test_scaled_gradients_of_fp16(make, by_hand, kind, monkeypatch) -> None:
    """The scaler of fp16 on a CPU, around float32 that can be compared."""
    monkeypatch.setattr(MixedPrecision, "forward_context", lambda _: nullcontext())
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14))
    assert_same(fit(make(kind), kind, 4, plugins=[plugin]), by_hand[kind])


def test_two_ranks(make, by_hand, tmp_path: Path) -> None:
    made = {kind: make(kind) for kind in ("foreign", "subclass")}
    fabrics = make("own")

    def run(rank: int) -> None:
        found = {kind: fit(m, kind, 2, rank, devices=2, strategy="ddp") for kind, m in made.items()}
        found["own"] = with_fabric(fabrics, 2, devices=2, strategy="ddp")
        torch.save(found, tmp_path / f"{rank}.pt")

    in_ranks(run, folder=tmp_path / "logs")
    for rank in range(2):
        for kind, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert_same(found, by_hand[kind])


def test_the_hook_before_steps_is_the_users() -> None:
    assert "on_before_optimizer_step" not in vars(dl.DistillationModule)


def test_without_a_trainer_the_schedule_must_be_given(make) -> None:
    module, _ = make("own")
    module._lr_scheduler = None
    with pytest.raises(dl.UserError, match="give DistillationModule an lr_scheduler"):
        module.configure_optimizers()
