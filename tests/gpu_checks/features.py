"""Precisions, packing, compilation, 8-bit parts, resuming and generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.models.student import build_student

from .setup import Setup, finite


def checks(setup: Setup) -> Iterator[tuple[str, Callable[[], str]]]:
    for precision in ("bf16-mixed", "16-mixed", "bf16-true"):
        for name in ("DSKD", "ETA", "X-Token P", "GOLD")[: 1 if setup.small else None]:
            yield f"{precision} {name}", partial(fitted, setup, name, {"precision": precision})
    yield "generation", partial(generation, setup)
    yield "test and predict with responses", partial(responses, setup)
    yield "resume", partial(resume, setup)
    yield "packing", partial(fitted, setup, "DSKD", {}, packing=True, batch_size=2)
    yield "packing, cached", partial(fitted, setup, "DSKD", {}, packing=True, batch_size=2, cached=True)
    yield "pinned memory, workers", partial(fitted, setup, "ETA", {}, pin_memory=True, num_workers=2)
    yield (
        "gradient checkpointing",
        partial(fitted, setup, "DSKD", {}, student={"gradient_checkpointing": True}),
    )
    yield "offloaded teacher", partial(fitted, setup, "ETA", {}, teacher={"offload": True})
    yield "8-bit optimizer", partial(eight_bit_optimizer, setup)
    yield "8-bit teacher", partial(quantised, setup, "8bit")
    yield "4-bit teacher", partial(quantised, setup, "4bit")


def fitted(setup: Setup, name: str, options: dict[str, Any], **run: Any) -> str:
    if options.get("precision") == "16-mixed" and setup.device.type == "cpu":
        pytest.skip("fp16 needs a GPU")
    module, data = setup.run(name, **run)
    trainer = setup.trainer(**options)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    # A first step of fp16 that overflows is left out, as its scaler is there to do.
    assert trainer.global_step >= 2
    return f"loss {finite(trainer.callback_metrics | {})['val/nll_per_token']:.4f}"


def eight_bit_optimizer(setup: Setup) -> str:
    optimizers = pytest.importorskip("bitsandbytes.optim")
    if setup.small:
        pytest.skip("its optimizers need a GPU")
    return fitted(setup, "ETA", {}, optimizer=lambda p: optimizers.AdamW8bit(p, lr=1e-3))


def quantised(setup: Setup, bits: str) -> str:
    pytest.importorskip("bitsandbytes")
    if setup.pretended:
        pytest.skip("its kernels need a GPU")
    return fitted(setup, "DSKD", {}, teacher={"quantization": bits})


class _Stop(L.Callback):
    """Save and stop in the middle of an epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def resume(setup: Setup) -> str:
    path = setup.folder / "resume.ckpt"

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2)

    states = []
    for callbacks, start in (([], None), ([_Stop(path)], None), ([], str(path))):
        module, data = setup.run("DSKD", optimizer=adam)
        trainer = setup.trainer(max_steps=5, callbacks=callbacks)
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=False)
        states.append({name: value.cpu() for name, value in module.state_dict().items()})
    assert any(not torch.equal(states[1][k], states[0][k]) for k in states[0]), "it didn't stop"
    worst = max(float((states[2][k] - states[0][k]).abs().max()) for k in states[0])
    assert worst < 2e-3, f"a resumed run differs by {worst:.1e}"
    return f"as an uninterrupted run up to {worst:.1e}"


def generation(setup: Setup) -> str:
    spec = setup.run("SFT")[0].student_spec
    model, tokenizer = build_student(spec)
    prompts = [tokenizer(text).input_ids for text in ("Say the number", "The quick brown fox jumps", "a")]
    found = []
    for device in ("cpu", setup.device):
        generator = Generator(model.to(device), tokenizer, GenerationSettings(max_new_tokens=12))
        runs = [list(generator(prompts, seed=seed)) for seed in (None, 10)]
        found.append([g.text for batches in runs for batch in batches for g in batch])
    same = sum(a == b for a, b in zip(*found, strict=True))
    assert same == len(found[0]), f"{same} of {len(found[0])} responses as on the CPU"
    return f"{same} of {len(found[0])} responses as on the CPU, greedy and sampled"


def responses(setup: Setup) -> str:
    from dskd_lightning.callbacks.responses import ResponseEvaluation  # needs rouge_score

    module, data = setup.run("ETA", lora=True)
    costs, folder = {}, setup.folder / "responses"
    for stage in ("test", "predict"):
        callback = ResponseEvaluation(folder / stage, seeds=(10,), max_new_tokens=4, max_length=None)
        trainer = setup.trainer(callbacks=[callback])
        if stage == "test":
            trainer.fit(module, datamodule=data)
            trainer.test(module, datamodule=data, verbose=False)
            costs = json.loads((folder / stage / "efficiency.json").read_text())
        else:
            trainer.predict(module, datamodule=data, return_predictions=False)
    values = json.loads((folder / "predict" / "predict.json").read_text())
    return f"ROUGE-L {values['rougeL']:.2f}; efficiency: {', '.join(sorted(costs))}"
