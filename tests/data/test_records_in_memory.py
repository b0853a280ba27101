"""Records that are in memory already train as those of a file do."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import write_data

import dskd_lightning as dl


def loaded(model_folder, tmp_path, train, **options):
    spec = dl.StudentSpec(model_folder(seed=1))
    data = dl.InstructionDataModule(
        train, student=spec, max_length=96, max_prompt_length=40, batch_size=4,
        cache_dir=str(tmp_path / "cache"), **options,
    )  # fmt: skip
    data.setup("fit")
    return data


def test_lists_and_datasets_give_the_files_batches(model_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    file = write_data(tmp_path / "data.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    found = []
    for train in (str(file), records, datasets.Dataset.from_list(records)):
        data = loaded(model_folder, tmp_path, train, val_split=4)
        batches = list(data.train_dataloader())
        assert len(data.examples("val")) == 4
        found.append([(b.student.input_ids, b.student.labels) for b in batches])
    for other in found[1:]:
        assert len(other) == len(found[0]) == 5
        for one, two in zip(found[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_changed_records_are_prepared_anew(model_folder, tmp_path):
    records = [{"prompt": f"say {i}", "response": "yes"} for i in range(8)]
    first = loaded(model_folder, tmp_path, records).examples("train")[0].response
    records[0] = {"prompt": "say 0", "response": "no"}
    assert (first, loaded(model_folder, tmp_path, records).examples("train")[0].response) == ("yes", "no")


def test_a_bad_record_is_named_by_its_number(model_folder, tmp_path):
    records = [{"prompt": "a", "response": "b"}, {"prompt": "a"}]
    with pytest.raises(dl.UserError, match=r"train data in memory:2"):
        loaded(model_folder, tmp_path, records)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (
            [{"prompt": "a", "response": "b"}, "file.jsonl"],
            "Record 2 of the train data in memory is",
        ),
        ([["a", "b"]], "Record 1"),
        ({"prompt": "a"}, "are a dict"),
        ([], "No data to train on"),
    ],
)
def test_what_is_no_record_is_one_sentence(model_folder, tmp_path, train, words):
    data = dl.InstructionDataModule(train, student=dl.StudentSpec(model_folder(seed=1)))
    with pytest.raises(dl.UserError, match=words):
        data.examples("train")
