"""Memory and time of the fused loss and of a whole step, beside plain computations."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import fused_loss
import torch
import training_step
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from .setup import Setup


def checks(setup: Setup) -> Iterator[tuple[str, Callable[[], str]]]:
    sizes: list[tuple[str, int, int]] = [("bfloat16", 152_000, 4096), ("float32", 152_000, 2048)]
    sizes += [("bfloat16", 32_000, 4096), ("bfloat16", 152_000, 16_384)]
    if setup.small:
        sizes = [("float32", 1000, 64)]
    for dtype, vocabulary, tokens in sizes:
        for train_head in (False, True):
            head = "trained" if train_head else "frozen"
            name = f"fused loss {dtype}, {vocabulary:,} x {tokens:,}, {head} head"
            yield name, partial(loss, setup, dtype, vocabulary, tokens, train_head)
    source = cache(partial(step_source, setup))
    for name in training_step.CASES:
        yield f"step, {name}", partial(step, setup, source, name)


def measured(case: Callable[[str, argparse.Namespace], None], name: str, a: argparse.Namespace) -> Any:
    """One case of a benchmark, in this process."""
    gc.collect()
    torch.cuda.empty_cache()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        case(name, a)
    return json.loads(output.getvalue().strip().splitlines()[-1])


def loss(setup: Setup, dtype: str, vocabulary: int, tokens: int, train_head: bool) -> str:
    a = argparse.Namespace(
        dtype=[dtype], vocabulary=[vocabulary], tokens=[tokens], hidden=896, teacher_hidden=2048,
        train_head=train_head, repeat=1 if setup.small else 5,
    )  # fmt: skip
    if setup.small:
        a.hidden, a.teacher_hidden = 16, 24
    room = torch.cuda.mem_get_info()[0] / 2**20 if setup.device.type == "cuda" else 1000.0
    fits = fused_loss.plain_mb(tokens, vocabulary, dtype) < 0.9 * room
    cases = ["floor", "fused", *(["plain"] if fits else [])]
    found = {name: measured(fused_loss.case, name, a) for name in cases}
    seconds = {name: sorted(f["seconds"])[len(f["seconds"]) // 2] for name, f in found.items()}
    parts = [f"{n} {1000 * seconds[n]:.1f} ms {found[n]['extra_mb']:,.0f} MiB" for n in cases]
    if fits:
        apart = abs(found["fused"]["loss"] / found["plain"]["loss"] - 1)
        assert apart < (1e-2 if dtype == "bfloat16" else 1e-4), f"fused and plain differ by {apart:.1e}"
        parts.append(f"fused / plain time {seconds['fused'] / seconds['plain']:.2f}")
        memory = found["plain"]["extra_mb"] / max(found["fused"]["extra_mb"], 1)
        parts.append(f"plain / fused memory {memory:.1f}")
    else:
        parts.append("plain doesn't fit")
    return "; ".join(parts)


def step_source(setup: Setup) -> tuple[str, str]:
    """A model of some 400 million random parameters (tiny on a CPU) and a file to train on."""
    folder = setup.folder / "step"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer) if setup.small else 152_064, hidden_size=32 if setup.small else 1024,
        intermediate_size=64 if setup.small else 4096, num_hidden_layers=2 if setup.small else 16,
        num_attention_heads=2 if setup.small else 16, num_key_value_heads=2 if setup.small else 8,
        max_position_embeddings=1024, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with setup.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    examples = 8 if setup.small else 64
    rows = [
        {"prompt": f"Write text {i}.", "response": "the fox jumps over apples " * (1 + 7 * i % 24)}
        for i in range(examples)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder), str(folder / "data.jsonl")


def step(setup: Setup, source: Callable[[], tuple[str, str]], name: str) -> str:
    model, data = source()
    a = argparse.Namespace(source=model, data=data, layers=1 if setup.small else 8, rounds=1)
    a.examples, a.batch_size, a.max_length = (4, 2, 64) if setup.small else (64, 8, 512)
    m = measured(training_step.case, name, a)
    total = sum(m["seconds"])
    return (
        f"{1000 * total / m['steps']:.0f} ms a step, {m['tokens'] / total:,.0f} tokens a second, "
        f"{m['extra_mb']:,.0f} MiB, padding {m['padding']:.0%}, first loss {m['first_loss']:.3f}"
    )
