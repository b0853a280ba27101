"""The short records of an instruction file, as `docs/cross_tokenizer.md` trains and tests on.

Run: ``python tests/benchmarks/short_records.py SOURCE TARGET [--characters 900] [--most N]``; writes the
first ``N`` records (all without it) whose instruction, input and output have at most so many characters
together, and prints how many of how many there are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FIELDS = (("instruction",), ("input", "context"), ("output", "response"))
"""What is kept, under its first name."""


def short_records(lines: list[str], characters: int, most: int | None) -> list[dict[str, str]]:
    """The first ``most`` records of at most ``characters``."""
    found: list[dict[str, str]] = []
    for line in lines:
        record = json.loads(line)
        kept = {names[0]: next((record[name] for name in names if name in record), "") for names in FIELDS}
        if sum(map(len, kept.values())) <= characters:
            found.append(kept)
    return found[:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--characters", type=int, default=900)
    parser.add_argument("--most", type=int)
    a = parser.parse_args()
    lines = [line for line in a.source.read_text(encoding="utf-8").split("\n") if line.strip()]
    found = short_records(lines, a.characters, a.most)
    a.target.parent.mkdir(parents=True, exist_ok=True)
    a.target.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    print(f"{a.target}: {len(found)} of {len(lines)} records")


if __name__ == "__main__":
    main()
