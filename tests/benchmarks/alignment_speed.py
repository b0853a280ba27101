"""Tokens per second of byte spans and exact alignment, on one core.

Run: ``python tests/benchmarks/alignment_speed.py``. Texts are Dolly responses where the data
folder is present (``DSKD_DATA_DIR``), else the test corpus; tokenisation itself isn't timed. A
tokenizer that drops or cannot spell some text tokenises it once more for its offsets: its figure
includes that.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import combinations
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "alignment")]

from conftest import CORPUS, DATA_DIR  # noqa: E402
from real_tokenizers import tokenizer_named  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from dskd_lightning.alignment.byte_spans import batch_byte_spans, token_byte_spans  # noqa: E402
from dskd_lightning.alignment.exact import align, align_many  # noqa: E402
from dskd_lightning.alignment.token_bytes import token_bytes  # noqa: E402


def main() -> None:
    file = DATA_DIR / "dolly" / "train.jsonl"
    if file.is_file():
        texts = [json.loads(line)["output"] for line in file.read_text().splitlines()]
    else:
        texts = CORPUS * 50
    names = ("gpt2", "mistral", "qwen1.5", "smollm2", "bpe", "wordpiece", "unigram")
    found = {name: tokenizer for name in names if (tokenizer := tokenizer_named(name)) is not None}
    ids = {}
    for name, tokenizer in found.items():
        codes = token_bytes(tokenizer).tracer.encode_batch(texts, add_special_tokens=False)
        ids[name] = [code.ids for code in codes]
    table = Table(title=f"Million tokens per second (both sides), {len(texts)} responses")
    for column in ("pair", "tokens", "spans", "align in batches", "both, batched", "both, one by one"):
        table.add_column(column, justify="left" if column == "pair" else "right")
    for pair in combinations(found, 2):
        tokens = sum(len(row) for name in pair for row in ids[name])
        begin = time.perf_counter()
        sides = [batch_byte_spans(found[name], texts, ids[name]) for name in pair]
        spans = time.perf_counter()
        for start in range(0, len(texts), 64):
            align_many(*(side[start : start + 64] for side in sides))
        aligned = time.perf_counter()
        for text, one, two in zip(texts, *(ids[name] for name in pair), strict=True):
            align(token_byte_spans(found[pair[0]], text, one), token_byte_spans(found[pair[1]], text, two))
        single = time.perf_counter()
        seconds = (spans - begin, aligned - spans, aligned - begin, single - aligned)
        table.add_row(" x ".join(pair), f"{tokens:,}", *(f"{tokens / s / 1e6:.2f}" for s in seconds))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
