"""Beside TRL's GOLDTrainer: one objective across two tokenizers, in both trainers.

Run: ``python tests/benchmarks/gold.py [--tokenizer FOLDER_OR_JSON] [--trl-python PYTHON]``; the student
is cut from the teacher and reads the given tokenizer, or one of 8,192 tokens trained on the data's
responses. TRL is installed as for `peers.py`.

TRL (``trl.experimental.gold.GOLDTrainer``, ``lmbda=0``: no generation) aligns in its loss; its
hybrid loss has fixed weights of 1 for matched and unmatched tokens, ``beta=0.5``. Ours is
`GOLDObjective` with the same settings and no cross-entropy, alignment read from the prepared data.
Both read the same conversations in batches of the same size, in the same order of the file; both
render them with the teacher's chat template.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _measure import device, environment, interleave, print_table  # noqa: E402
from _training import LR, add_arguments, finish, forwarded, train_with_lightning  # noqa: E402
from _trl import COLUMNS, StepTimer, imports, rows_beside  # noqa: E402

import dskd_lightning as dl  # noqa: E402
from dskd_lightning.models.loading import load_tokenizer  # noqa: E402
from dskd_lightning.models.spec import PruneSpec  # noqa: E402
from dskd_lightning.models.tokenizer_swap import train_bpe  # noqa: E402
from dskd_lightning.objectives import GOLDObjective  # noqa: E402
from dskd_lightning.structures import DistillationBatch  # noqa: E402
from dskd_lightning.vocab.run import read_responses  # noqa: E402

TRL, OURS = "TRL GOLDTrainer", "ours, GOLD"


def case(name: str, a: argparse.Namespace) -> None:
    """Measure one case in this process."""
    teacher = dl.TeacherSpec(a.source, dtype="bfloat16")
    student = dl.StudentSpec(
        a.source, tokenizer=a.tokenizer, dtype="float32", prune=PruneSpec(layers=a.layers, by="even")
    )
    student.chat_template = load_tokenizer(teacher).chat_template
    objective = GOLDObjective(
        kd_ratio=1.0, temperature=1.0, beta=0.5, matched_weight=1.0, unmatched_weight=1.0, skip_eos=True
    )
    module = dl.DistillationModule(student, objective, teacher)
    with tempfile.TemporaryDirectory() as folder:
        data = dl.InstructionDataModule(
            a.data, student=student, teacher=teacher, limit=a.examples, max_length=a.max_length,
            max_prompt_length=a.max_length // 2, batch_size=a.batch_size, cache_dir=folder,
        )  # fmt: skip
        data.setup("fit")
        if name == OURS:
            train_with_lightning(module, list(data.train_dataloader()))
            return
        found = list(data.train_dataloader())
        examples = data.examples("train")
        rows = [
            {"messages": [{"role": m.role, "content": m.content} for m in examples[int(i)].messages]}
            for batch in [found[0], *found]
            for i in batch.examples
        ]
        _trl(a, module, rows, found, folder, teacher)


def _trl(
    a: argparse.Namespace,
    module: dl.DistillationModule,
    rows: list[dict[str, Any]],
    found: list[DistillationBatch],
    folder: str,
    teacher: dl.TeacherSpec,
) -> None:
    from datasets import Dataset
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    module.configure_model()
    load_tokenizer(teacher).save_pretrained(f"{folder}/teacher")
    timer = StepTimer()
    settings = GOLDConfig(
        output_dir=f"{folder}/trl", lmbda=0.0, beta=0.5, temperature=1.0, use_uld_loss=True,
        uld_use_hybrid_loss=True, uld_hybrid_matched_weight=1.0, uld_hybrid_unmatched_weight=1.0,
        teacher_tokenizer_name_or_path=f"{folder}/teacher", per_device_train_batch_size=a.batch_size,
        num_train_epochs=1, learning_rate=LR, bf16=True, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=device().type == "cpu",
        max_length=a.max_length, max_completion_length=a.max_length // 2, dataloader_drop_last=True,
    )  # fmt: skip
    trainer = GOLDTrainer(
        model=module.student, teacher_model=module.teachers[0], args=settings,
        train_dataset=Dataset.from_list(rows), processing_class=module.tokenizer, callbacks=[timer],
    )  # fmt: skip
    trainer.train()
    finish([timer.seconds], timer.memory, found, timer.losses[0])


def _small_tokenizer(a: argparse.Namespace, folder: str) -> str:
    texts = read_responses(a.data, limit=2000)
    train_bpe(texts, 8192, like=load_tokenizer(dl.TeacherSpec(a.source))).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--tokenizer", help="the student's: a folder or a tokenizer.json")
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON", sys.executable))
    a = parser.parse_args()
    if a.case:
        case(a.case, a)
        return
    names = [OURS]
    if imports(a.trl_python, "trl"):
        names.insert(0, TRL)
    else:
        print(f"Skipped: {TRL}: {a.trl_python} has no trl")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*forwarded(a), "--tokenizer", a.tokenizer or _small_tokenizer(a, folder)]
        found = interleave(__file__, dict.fromkeys(names, arguments), a.rounds, {TRL: a.trl_python})
    print(f"An epoch of {a.examples} examples of {a.data}\n{environment()}")
    title = f"Medians of {a.rounds} rounds; tokens are the student's, unpadded"
    print_table(title, COLUMNS, rows_beside(found, TRL))


if __name__ == "__main__":
    main()
