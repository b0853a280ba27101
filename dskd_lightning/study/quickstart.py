"""The studies that a newcomer runs first, in the precision that suits the processor."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from dskd_lightning.demo import DATASET
from dskd_lightning.files import put_in_place, write_atomic
from dskd_lightning.processor import FLOAT32_CONFIG, SLOW, slowdown
from dskd_lightning.study.study import Study

__all__ = ["quickstart_study"]

logger = logging.getLogger(__name__)

VOCABULARY = 8192
"""Tokens of the student's own vocabulary at most, a sixth of its teacher's; the demo's texts give 7,845."""


def quickstart_study(output: str | None = None, cross: bool = False) -> Study:
    """``dskd:quickstart.study`` as it stands, or in float32 where the processor only emulates bfloat16.

    Args:
        output: folder of the study; None for the study's own.
        cross: ``dskd:quickstart_cross.study`` instead, whose student reads a vocabulary of its own: a
            byte-level BPE trained on the demo's texts, which is written to ``tokenizer`` in the folder.
    """
    study = Study.read(f"dskd:quickstart{'_cross' if cross else ''}.study", output)
    if cross:
        student = {"tokenizer": str(_own_tokenizer(study.output)), "freeze_embeddings": False}
        overlay = study.output / "student.yaml"
        write_atomic(overlay, yaml.safe_dump({"model": {"student": student}}))
        study = study.over(str(overlay))
    times = slowdown()
    if times <= SLOW:
        return study
    logger.info(
        "bfloat16 takes %.0f times as long as float32 on this processor: computing in float32 (%s).",
        times,
        FLOAT32_CONFIG,
    )
    return study.over(FLOAT32_CONFIG)


def _own_tokenizer(output: Path) -> Path:
    """The folder of the student's tokenizer, trained now if it isn't there: always the same."""
    from dskd_lightning.models.spec import ModelSpec
    from dskd_lightning.models.tokenizer import load_tokenizer
    from dskd_lightning.models.tokenizer_swap import train_bpe

    folder = (output / "tokenizer").resolve()
    if not folder.is_dir():
        tokenizer = train_bpe(_texts(), VOCABULARY, load_tokenizer(ModelSpec("demo")))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tokenizer-") as new:
            tokenizer.save_pretrained(Path(new, "whole"))
            put_in_place(Path(new, "whole"), folder)
    return folder


def _texts() -> Iterator[str]:
    with DATASET.open(encoding="utf-8") as lines:
        for line in lines:
            yield from (value for value in json.loads(line).values() if isinstance(value, str))
