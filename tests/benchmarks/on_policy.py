"""Sampling for on-policy distillation: a buffer at once against one prompt at a time; its share of a step.

Run: ``python tests/benchmarks/on_policy.py [--data FILE] [--examples N] [--layers L]``; the student is cut
from SmolLM2-135M-Instruct, the teacher is whole, both in float32.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from _measure import environment, print_table  # noqa: E402
from _training import add_arguments, batches, module_of  # noqa: E402

import dskd_lightning as dl  # noqa: E402
from dskd_lightning.data.samples import prompts_of  # noqa: E402
from dskd_lightning.generation.samples import GeneratorSampler, sample_key  # noqa: E402


def sampling(module: Any, prompts: list[list[int]], new_tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of both ways, and how many of the responses are the same."""
    keys = [sample_key(prompt, at, 0) for at, prompt in enumerate(prompts)]
    found: dict[str, list[float]] = {"alone": [], "at once": []}
    responses: dict[str, Any] = {}
    for _ in range(rounds):
        for name, size in (("alone", 1), ("at once", len(prompts))):
            sampler = GeneratorSampler(max_new_tokens=new_tokens, batch_size=size)
            start = time.perf_counter()
            responses[name] = sampler(module.student, module.tokenizer, prompts, keys, 0)
            found[name].append(time.perf_counter() - start)
    same = sum(a == b for a, b in zip(responses["alone"], responses["at once"], strict=True))
    tokens = sum(len(sample.ids) for sample in responses["at once"])
    return {
        "seconds": {name: median(values) for name, values in found.items()},
        "same": same,
        "tokens": tokens,
    }


def training(module: Any, found: list[Any], settings: dl.OnPolicySettings) -> tuple[float, float]:
    """Seconds of all steps of one buffer, and of the sampling within them."""
    module.on_policy = settings
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)
    start = time.perf_counter()
    windows = iter([[batch] for batch in found])
    for step, window in enumerate(module.with_samples(windows, len(found), step=0)):
        for batch in window:
            module.training_step(batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start, module.sampling_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.set_defaults(layers=20, examples=64, max_length=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    a = parser.parse_args()
    module = module_of(a, dl.DSKDObjective())
    module.configure_model()
    module.float()
    found = batches(a)
    prompts = [prompt for batch in found for prompt in prompts_of(batch.student)]
    result = sampling(module, prompts, a.new_tokens, a.rounds)
    seconds, count = result["seconds"], result["tokens"]
    print(environment())
    print_table(
        f"{len(prompts)} prompts, {a.new_tokens} tokens each at most; {result['same']} responses the same",
        ("sampling", "s", "tokens/s", "speed"),
        [
            (name, f"{taken:.1f}", f"{count / taken:.0f}", f"{seconds['alone'] / taken:.1f}")
            for name, taken in seconds.items()
        ],
    )
    settings = dl.OnPolicySettings(max_new_tokens=a.new_tokens, buffer_steps=len(found))
    whole, spent = training(module, found, settings)
    print_table(
        f"{len(found)} optimiser steps of {a.batch_size} prompts, buffer of {len(found)}",
        ("part", "s", "share"),
        [
            ("sampling", f"{spent:.1f}", f"{spent / whole:.2f}"),
            ("teacher, student, optimiser", f"{whole - spent:.1f}", f"{1 - spent / whole:.2f}"),
        ],
    )


if __name__ == "__main__":
    main()
