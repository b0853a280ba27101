"""The instruction set of the quickstart and the script that made it."""

from pathlib import Path

__all__ = ["DATASET", "PROMPTS"]

PROMPTS = Path(__file__).with_name("prompts.jsonl")
"""412 instructions of our own."""

DATASET = Path(__file__).with_name("instructions.jsonl")
"""The same with responses by SmolLM2-135M-Instruct (Apache-2.0)."""
