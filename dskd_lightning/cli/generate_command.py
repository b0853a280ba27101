"""`dskd generate`: a model's answers to a file of prompts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.preparation import PreparationSettings, read_examples
from dskd_lightning.data.sources import resolve_sources
from dskd_lightning.files import write_atomic
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.models.loading import load_model, load_tokenizer
from dskd_lightning.models.spec import ModelSpec
from dskd_lightning.runs.heartbeat import Progress

__all__ = ["generate_responses"]


def generate_responses(
    model: str,
    prompts: str,
    output: str,
    settings: GenerationSettings,
    seed: int | None,
    dtype: Any,
    limit: int | None,
) -> None:
    """Answer every prompt and write ``{"messages": [...]}`` lines with unread fields, atomically."""
    spec = ModelSpec(source=model, dtype=dtype)
    tokenizer = load_tokenizer(spec)
    renderer = ChatRenderer.from_spec(tokenizer, spec)
    reading = PreparationSettings(limit=limit, needs_response=False)
    examples = list(read_examples(resolve_sources(prompts), reading, Counter()))
    generator = Generator(load_model(spec), tokenizer, settings)
    texts: dict[int, str] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cast("Any", generator.model).to(device)
    prompt_ids = [renderer.generation_prompt(e.prompt, e.place, tools=e.tools) for e in examples]
    with Progress("Responses", len(examples), "prompts", seconds=10) as progress:
        for batch in generator(prompt_ids, seed=seed):
            texts |= {generation.index: generation.text for generation in batch}
            progress.done = len(texts)
        progress.say()
    lines = []
    for index, example in enumerate(examples):
        turns = [
            {"role": m.role, "content": m.content, **(json.loads(m.extra) if m.extra else {})}
            for m in example.prompt
        ]
        turns.append({"role": "assistant", "content": texts[index]})
        tools = {"tools": json.loads(example.tools)} if example.tools else {}
        fields = json.loads(example.fields) if example.fields else {}
        lines.append(json.dumps({**fields, "messages": turns, **tools}, ensure_ascii=False))
    write_atomic(Path(output), "\n".join(lines) + "\n")
