from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import write_data

from dskd_lightning.cache_dir import cache_dir
from dskd_lightning.callbacks.prompts import prompt_records
from dskd_lightning.data import InstructionDataModule
from dskd_lightning.errors import UserError
from dskd_lightning.models.spec import StudentSpec, TeacherSpec
from dskd_lightning.structures import DistillationBatch

WORDS = ["apples", "pears", "plums", "naïve", "🙂", "café", "fox", "12345", "dog"]


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {"instruction": f"Say {i}.", "input": "", "output": " ".join(rng.choice(WORDS, rng.integers(1, 12)))}
        for i in range(23)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def make(model_folder, data_file: Path, tmp_path: Path):
    def build(**arguments) -> InstructionDataModule:
        defaults = {
            "train": str(data_file),
            "student": StudentSpec(model_folder()),
            "teacher": TeacherSpec(model_folder(tokenizer="sentencepiece", add_bos=True)),
            "max_length": 128,
            "max_prompt_length": 64,
            "batch_size": 4,
            "cache_dir": str(tmp_path / "cache"),
        }
        return InstructionDataModule(**{**defaults, **arguments})

    return build


MODES = [
    {},
    {"max_tokens_per_batch": 256},
    {"packing": True, "batch_size": 2},
    {"packing": True, "max_tokens_per_batch": 256},
]


@pytest.mark.parametrize("mode", MODES)
def test_batches_hold_the_same_responses_aligned(make, mode: dict) -> None:
    dm = make(**mode, pad_to_multiple_of=8)
    seen = []
    for batch in dm.train_dataloader():
        assert isinstance(batch, DistillationBatch)
        seen += batch.examples.tolist()
        student, (teacher,), (alignment,) = batch.student, batch.teachers, batch.alignments
        for side, tokenizer in ((student, dm.student_tokenizer), (teacher, dm.teacher_tokenizers[0])):
            assert side.input_ids.shape[1] % 8 == 0
            assert (side.attention_mask is None) == bool(mode.get("packing"))
            labels = side.select(side.labels)
            assert (labels != -100).all()
            assert len(labels) == (side.labels != -100).sum()
            for number, row in enumerate(batch.examples.tolist()):
                mine = labels[side.sequence == number]
                assert tokenizer.decode(mine[:-1]).strip() == dm.examples("train").row(row).response
                assert mine[-1] == tokenizer.eos_token_id
            # Positions restart exactly where an example starts; each is its own example's offset.
            starts = side.select(side.position_ids)
            assert (starts < 128).all()
        assert alignment.student_end.shape == student.response.shape
        assert alignment.teacher_end.shape == teacher.response.shape
        pairs = alignment.pairs
        assert (student.sequence[pairs[:, 0]] == teacher.sequence[pairs[:, 1]]).all()
        assert (alignment.student_end[pairs[:, 0]] == alignment.teacher_end[pairs[:, 1]]).all()
        last = student.select(student.labels) == dm.student_tokenizer.eos_token_id
        assert torch.equal(alignment.student_end[last], batch.response_bytes + 1)
        assert set(last.nonzero().flatten().tolist()) <= set(pairs[:, 0].tolist())
        assert 0 <= batch.padding_share < 1
    assert sorted(seen) == list(range(23))


def test_packed_rows_equal_single_rows(make) -> None:
    single = {i: (ids, labels) for batch in make().train_dataloader() for i, ids, labels in _rows(batch)}
    packed = list(make(packing=True).train_dataloader())
    assert any(len(batch) > batch.student.input_ids.shape[0] for batch in packed)
    for batch in packed:
        for i, ids, labels in _rows(batch):
            assert ids == single[i][0]
            assert labels == single[i][1]


def _rows(batch: DistillationBatch):
    """Each example's ids and labels, cut out where positions restart."""
    tokens, number = batch.student, 0
    for row in range(tokens.input_ids.shape[0]):
        positions = tokens.position_ids[row]
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for start, stop in itertools.pairwise(starts):
            labels = tokens.labels[row, start:stop]
            if not (labels != -100).any():
                continue  # the padding behind a packed row
            last = int((labels != -100).nonzero().max()) + 1
            ids = tokens.input_ids[row, start : start + last].tolist()
            yield int(batch.examples[number]), ids, labels[:last].tolist()
            number += 1


def test_same_tokenizer_needs_no_alignment(make, model_folder) -> None:
    batch = next(iter(make(teacher=TeacherSpec(model_folder(seed=1))).train_dataloader()))
    assert batch.alignments == (None,)
    assert torch.equal(batch.student.input_ids, batch.teachers[0].input_ids)
    alone = next(iter(make(teacher=None).train_dataloader()))
    assert alone.teachers == alone.alignments == alone.teacher_hidden == ()


def test_two_teachers_and_cached_hidden_states(make, model_folder) -> None:
    dm = make(teacher=[TeacherSpec(model_folder(seed=1)), TeacherSpec(model_folder(tokenizer="unigram"))])

    class Store:
        def get(self, examples):
            dataset = dm.examples("train").dataset
            return [torch.full((len(dataset.rendered(i, 2).response), 3), float(i)) for i in examples]

    dm.teacher_hidden["train"] = (None, Store())
    batch = next(iter(dm.train_dataloader()))
    assert batch.alignments[0] is None
    assert batch.alignments[1] is not None
    assert batch.teacher_hidden[0] is None
    second = batch.teachers[1]
    assert torch.equal(batch.teacher_hidden[1][:, 0], batch.examples[second.sequence].float())


def test_splits_are_disjoint_and_seeded(make) -> None:
    dm = make(val_split=0.2, test_split=3)
    parts = {stage: set(dm.examples(stage).indices.tolist()) for stage in ("train", "val", "test")}
    assert [len(parts[s]) for s in ("train", "val", "test")] == [15, 5, 3]
    assert set.union(*parts.values()) == set(range(23))
    assert parts["val"] == set(make(val_split=0.2, test_split=3).examples("val").indices.tolist())
    assert parts["val"] != set(make(val_split=0.2, test_split=3, seed=1).examples("val").indices.tolist())
    assert make().val_dataloader() == []


def test_report_and_generation_prompt(make) -> None:
    dm = make(max_prompt_length=8, max_length=20)
    report = dm.examples("train") and dm.report["train"]
    assert report["read"] == 23
    assert report["truncated prompts"] > 0
    assert report["truncated responses"] > 0
    assert report["used"] + report.get("skipped: no room for the response", 0) == 23
    view = dm.examples("train")
    for model in (0, 1):
        prompt = dm.generation_prompt(view[0], model)
        tokens = view.dataset.rendered(int(view.indices[0]), model)
        assert tokens.input_ids[: len(prompt)].tolist() == prompt
        assert tokens.response[0] == len(prompt) - 1


def test_whitespace_around_what_is_learnt_is_counted(make, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": " x\n", "response": r}) + "\n" for r in ("a", " b", "c\n")))
    for learn, count in (("assistant", 2), ("everything", 3)):
        dm = make(train=str(path), learn=learn)
        dm.examples("train")
        assert dm.report["train"]["responses without their outer whitespace"] == count


@pytest.mark.parametrize("learn", ["assistant", "last", "everything"])
def test_the_prompts_of_conversations_are_those_of_training(make, tmp_path: Path, learn: str) -> None:
    path = tmp_path / "turns.jsonl"
    rows = []
    for count in range(1, 6):
        turns = [("user", "Name some fruit, please. " * 6), ("assistant", "apples")]
        turns += [("user", f"And {count}?"), ("assistant", "plums and pears")] * count
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dm = make(train=str(path), learn=learn, max_length=200, max_prompt_length=30)
    view, whole = dm.examples("train"), 0
    for index, row in enumerate(view.indices.tolist()):
        learnt = {"last": 1, "assistant": index + 2, "everything": 2 * (index + 2)}[learn]
        for model in (0, 1):
            tokens = view.dataset.rendered(row, model)
            prompt = dm.generation_prompt(view[index], model)
            assert len(prompt) < 200
            if len(tokens.spans) == learnt and tokens.spans[-1].end.any():  # else its end was cut
                ids = [*tokens.input_ids.tolist(), int(tokens.labels[-1])]
                assert ids[: -len(tokens.spans[-1])] == prompt
                whole += 1
    assert whole > 2
    assert dm.report["train"]["truncated prompts"] == (0 if learn == "everything" else 5)


def test_cache_is_reused_and_keyed_by_content(make, data_file: Path, monkeypatch) -> None:
    first = make().examples("train").dataset.folder
    monkeypatch.setattr("dskd_lightning.data.preparation._write", None)
    assert make().examples("train").dataset.folder == first
    monkeypatch.undo()
    data_file.write_text(data_file.read_text() + '\n{"instruction": "x", "output": "y"}')
    assert make().examples("train").dataset.folder != first
    assert make(max_length=100).examples("train").dataset.folder != first
    assert not list(first.parent.glob(".preparing-*"))


def test_what_killed_preparations_left_goes_after_a_day(make, tmp_path: Path) -> None:
    cache, ago = tmp_path / "cache", time.time() - 25 * 3600
    for name in ("dead", "written"):
        folder = cache / f".preparing-{name}"
        folder.mkdir(parents=True)
        (folder / "examples.arrow").write_bytes(b"half")
        if name == "dead":
            os.utime(folder / "examples.arrow", (ago, ago))
        os.utime(folder, (ago, ago))
    make().examples("train")
    assert [path.name for path in cache.glob(".preparing-*")] == [".preparing-written"]


def test_failed_preparation_leaves_nothing(make, data_file: Path, tmp_path: Path) -> None:
    data_file.write_text('{"instruction": "x", "output": "y"}\n{"instruction": "x"\n')
    with pytest.raises(UserError, match=r"train\.jsonl:2"):
        make().examples("train")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "arguments", "needle"),
    [
        ('{"instruction": "x", "output": ""}', {}, r"train\.jsonl:1 has no response"),
        ('{"instruction": "x", "output": ""}', {"skip_invalid": True}, "No example is left.*no response: 1"),
        ("", {}, "No example is left"),
        (None, {"max_prompt_length": 128}, "no room"),
        (None, {"max_tokens_per_batch": 100}, "less than one example"),
        (None, {"batch_size": 0}, "batch_size: 0"),
        (None, {"val_split": 23}, "val_split: 23"),
        (None, {"val_split": -0.1}, "val_split"),
        (None, {"train": None}, "No data to train on"),
        (None, {"train": "/none.jsonl"}, "doesn't exist"),
        (None, {"student": None}, "need a `student`"),
    ],
)
def test_user_errors(make, data_file: Path, text: str | None, arguments: dict, needle: str) -> None:
    if text is not None:
        data_file.write_text(text)
    with pytest.raises(UserError, match=needle):
        make(**arguments).train_dataloader()


def test_predict_needs_no_responses(make, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"instruction": "x", "topic": "é", "none": ""}\n{"instruction": "y", "topic": null}')
    dm = make(predict=str(path))
    (batch,) = dm.predict_dataloader()
    assert [record.fields for record in prompt_records(dm, "predict")] == [{"topic": "é"}, {}]
    assert [dm.examples("predict").row(i).prompt[0].content for i in batch.examples.tolist()] == ["x", "y"]


def test_default_cache_dir(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSKD_CACHE_DIR", str(tmp_path))
    assert cache_dir("data") == tmp_path / "data"


class Recorder(pl.LightningModule):
    """Notes which examples each step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []
        self.fail_at = -1

    def training_step(self, batch: DistillationBatch, index: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("boom")
        self.seen.append(tuple(batch.examples.tolist()))
        return self.weight.sum() * len(batch)

    def validation_step(self, batch: DistillationBatch, index: int) -> None:
        assert len(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path: Path, *callbacks: pl.Callback, **arguments) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(callbacks), callbacks=list(callbacks),
        **{"max_epochs": 3, **arguments},
    )  # fmt: skip


@pytest.mark.parametrize("mode", [{}, {"max_tokens_per_batch": 256}, {"packing": True}])
@pytest.mark.parametrize("weight", [0, 0.4, 1, 2.5])
def test_weights_say_how_often_a_file_is_read(make, data_file: Path, mode: dict, weight: float) -> None:
    other = data_file.with_name("other.jsonl")
    rows = [json.dumps({"instruction": f"Other {i}", "output": "plums " * (1 + i % 5)}) for i in range(20)]
    other.write_text("\n".join(rows))
    dm = make(train=[str(data_file), str(other)], weights={str(other): weight}, **mode)
    loader, seen, batches = dm.train_dataloader(), [], []
    for epoch in range(10):
        loader.set_epoch(epoch)
        seen.append([i for batch in loader for i in batch.examples.tolist()])
        batches.append(len(loader))
    assert len(set(batches)) == 1
    assert len(dm.first_epoch()) == len(seen[0]) == 23 + 20 * weight
    names, files = dm.examples("train").dataset.sources()
    assert names == [str(data_file), str(other)]
    for epoch in seen:
        counts = np.bincount(epoch, minlength=43)
        assert set(counts[files == 0]) == {1}
        assert counts[files == 1].sum() == 20 * weight
        assert set(counts[files == 1]) <= {int(weight), int(weight) + 1}
    total = np.bincount(np.concatenate(seen), minlength=43)[files == 1]
    assert total.max() - total.min() <= 2  # all of them in turn


@pytest.mark.parametrize(
    ("weights", "needle"),
    [
        ({"b": 1}, "names 'b', which isn't in `train`"),
        ({"FILE": -1}, "number from 0"),
        ({"FILE": 0}, "no example"),
    ],
)
def test_weights_that_mean_nothing(make, data_file: Path, weights: dict, needle: str) -> None:
    weights = {str(data_file) if name == "FILE" else name: weight for name, weight in weights.items()}
    with pytest.raises(UserError, match=needle):
        make(weights=weights).train_dataloader()


@pytest.mark.parametrize("mode", [*MODES[:3], {"weights": {"FILE": 1.6}}])
def test_resume_from_every_step_continues_with_the_next_batch(make, tmp_path: Path, mode: dict) -> None:
    mode = {**mode, "val_split": 3}
    if "weights" in mode:
        mode["weights"] = {make().sources["train"]: 1.6}
    whole = Recorder()
    saver = ModelCheckpoint(
        tmp_path / "ckpt", "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    trainer(tmp_path, saver).fit(whole, datamodule=make(**mode))
    steps = len(whole.seen)
    per_epoch = steps // 3
    assert per_epoch >= 3
    orders = [whole.seen[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    same = [sorted(sum(order, ())) == sorted(sum(orders[0], ())) for order in orders]
    assert all(same) != ("weights" in mode)  # a weight that isn't whole takes others in turn
    assert orders[0] != orders[1] != orders[2]
    for step in range(1, steps):
        resumed = Recorder()
        path = tmp_path / "ckpt" / f"step={step}.ckpt"
        trainer(tmp_path).fit(resumed, datamodule=make(**mode), ckpt_path=path, weights_only=True)
        assert resumed.seen == whole.seen[step:], step


def test_resume_with_workers_and_from_epoch_end_and_exception(make, tmp_path: Path) -> None:
    whole = Recorder()
    end = ModelCheckpoint(tmp_path / "end", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer(tmp_path, end).fit(whole, datamodule=make())
    resumed = Recorder()
    trainer(tmp_path).fit(
        resumed, datamodule=make(num_workers=1), ckpt_path=tmp_path / "end" / "epoch=0.ckpt"
    )
    assert resumed.seen == whole.seen[len(whole.seen) // 3 :]

    broken = Recorder()
    broken.fail_at = 8
    fit = trainer(tmp_path)
    with pytest.raises(RuntimeError, match="boom"):
        fit.fit(broken, datamodule=make())
    assert broken.seen == whole.seen[:8]
    fit.save_checkpoint(tmp_path / "broken.ckpt")
    resumed = Recorder()
    trainer(tmp_path).fit(resumed, datamodule=make(num_workers=1), ckpt_path=tmp_path / "broken.ckpt")
    assert resumed.seen == whole.seen[8:]


OTHER_DATA: dict[str, dict] = {
    "batch size": {"batch_size": 3},
    "seed": {"seed": 5},
    "truncation": {"max_length": 40, "max_prompt_length": 20},
    "packing": {"packing": True},
    "split": {"val_split": 3},
    "content": {},
}


@pytest.mark.parametrize("what", [*OTHER_DATA, "ranks"])
def test_resume_with_other_batches_is_refused(make, tmp_path: Path, what: str) -> None:
    saver = ModelCheckpoint(tmp_path / "c", "last", every_n_train_steps=2)
    trainer(tmp_path, saver, max_steps=2).fit(Recorder(), datamodule=make())
    path = tmp_path / "c" / "last.ckpt"
    if what == "ranks":
        state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        loader = make().train_dataloader()
        loader.load_state_dict(state)
        loader.ranks = 2
        del loader.key
        with pytest.raises(UserError, match="place in the epoch"):
            loader.load_state_dict(state)
        return
    if what == "content":
        before, data = make().examples("train").dataset.lengths, Path(make().sources["train"])
        data.write_text(data.read_text().replace("Say 7.", "Say 8."))
        assert (make().examples("train").dataset.lengths == before).all()
    with pytest.raises(UserError, match="place in the epoch"):
        trainer(tmp_path).fit(Recorder(), datamodule=make(**OTHER_DATA[what]), ckpt_path=path)


def test_overfitting_repeats_the_same_batches(make, tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path, overfit_batches=2).fit(model, datamodule=make())
    assert model.seen[:2] * 3 == model.seen


def test_training_randomness_is_left_alone(make) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(make().train_dataloader())
    assert torch.equal(torch.rand(3), expected)


class RankDump(Recorder):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.validated = folder, []

    def validation_step(self, batch: DistillationBatch, index: int) -> None:
        self.validated += batch.examples.tolist()
        assert batch.student.input_ids.shape[0] > 0
        assert len(batch) or not len(batch.student.response)

    def on_train_end(self) -> None:
        state = json.dumps([self.seen, self.validated])
        (self.folder / f"rank{self.global_rank}.json").write_text(state)


def test_two_ranks_share_every_batch(make, tmp_path: Path) -> None:
    one = Recorder()
    trainer(tmp_path, max_epochs=1).fit(one, datamodule=make(batch_size=8))
    fit = trainer(tmp_path, max_epochs=1, devices=2, strategy="ddp_fork", num_sanity_val_steps=0)
    fit.fit(RankDump(tmp_path), datamodule=make(batch_size=4, val=make().sources["train"], eval_batch_size=5))
    states = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [tuple(a + b) for a, b in zip(states[0][0], states[1][0], strict=True)] == one.seen
    assert sorted(states[0][1] + states[1][1]) == list(range(23))


def test_a_loader_counts_what_is_waited_for_it(make, monkeypatch) -> None:
    """Three seconds for each batch, a hundred for what is done with it."""
    now = [0.0]
    monkeypatch.setattr("dskd_lightning.data.loader.time.perf_counter", lambda: now[0])
    dm = make()
    loader = dm.train_dataloader()
    collate = loader.collator

    def slow(rows):
        now[0] += 3.0
        return collate(rows)

    loader.collator = slow
    for _ in range(2):
        for _ in loader:
            now[0] += 100.0
    assert loader.waited == 2 * 3.0 * len(loader)


def test_a_workers_error_is_its_sentence_alone(make, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("one sentence.")

    dm = make(num_workers=1)
    loader = dm.train_dataloader()
    monkeypatch.setattr(type(loader.collator), "__call__", fail)
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    assert str(caught.value) == "one sentence."


def test_a_data_file_whose_name_is_no_text(make, data_file: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(data_file.parent) + b"/a\xff.jsonl"))
    path.write_text(data_file.read_text())
    examples = make(train=str(path)).examples("train")
    assert examples.dataset.example(0).source.endswith("/a\ufffd.jsonl")


def _flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped first": lambda path: _flip(path, 0),
    "flipped 20 %": lambda path: _flip(path, 0.2),
    "flipped 60 %": lambda path: _flip(path, 0.6),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["examples.arrow", "model-0.arrow", "lengths.npy", "report.json"])
def test_damaged_prepared_data_are_named_before_use(make, name: str, damage: str) -> None:
    folder = make().examples("train").dataset.folder
    DAMAGES[damage](folder / name)
    with pytest.raises(UserError, match=rf"{folder.name}.*delete th"):
        dataset_rows(make)
    shutil.rmtree(folder)
    assert len(make().examples("train").dataset) == len(dataset_rows(make))


def dataset_rows(make) -> list:
    dataset = make().examples("train").dataset
    assert all(dataset.example(index).messages for index in range(len(dataset)))
    return [dataset.rendered(index) for index in range(len(dataset))]


def test_every_byte_that_is_read_of_prepared_data_is_checked(make, monkeypatch) -> None:
    """Blocks are small here, so that one flipped byte anywhere is in one of many."""
    monkeypatch.setattr("dskd_lightning.data.chunks._RECORDS", 3)
    whole = dataset_rows(make)
    folder = make().examples("train").dataset.folder
    path = folder / "model-0.arrow"
    good = path.read_bytes()
    for at in range(0, len(good) - 8, max(1, len(good) // 50)):  # the last 8 end the stream
        content = bytearray(good)
        content[at] ^= 0x10
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model-0\.arrow: its checksum differs"):
            dataset_rows(make)
    path.write_bytes(good)
    again = dataset_rows(make)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(whole, again, strict=True))
    loaded = pickle.loads(pickle.dumps(make().examples("train").dataset))
    assert (loaded.rendered(1).labels == whole[1].labels).all()


@pytest.mark.parametrize("packing", [False, True])
def test_batches_know_their_extent(model_folder, tmp_path, packing):
    """Examples, and the most response positions of one, which a GPU would be waited for."""
    student = StudentSpec(model_folder(seed=1))
    data = InstructionDataModule(
        str(write_data(tmp_path / "data.jsonl")), student=student, teacher=TeacherSpec(student.source),
        cache_dir=str(tmp_path / "cache"), batch_size=3, max_length=96, max_prompt_length=40, packing=packing,
    )  # fmt: skip
    data.setup("fit")
    for batch in data.train_dataloader():
        for tokens in (batch.student, *batch.teachers):
            counts = torch.bincount(tokens.sequence)
            assert tokens.extent == (len(batch), int(counts.max()))
        assert batch.to("cpu").student.extent == batch.student.extent


def test_batches_grouped_by_length_in_training(model_folder, tmp_path):
    student = StudentSpec(model_folder(seed=1))
    settings = {"cache_dir": str(tmp_path / "cache"), "max_length": 96, "max_prompt_length": 40}
    padding = []
    for grouped in (False, True):
        data = InstructionDataModule(
            str(write_data(tmp_path / "data.jsonl", 60)), student=student, batch_size=6,
            group_by_length=grouped, **settings,
        )  # fmt: skip
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert sorted(int(i) for batch in batches for i in batch.examples) == list(range(60))
        padding.append(sum(batch.padding_share for batch in batches) / len(batches))
    assert padding[1] < padding[0] / 3
    for other in ({"packing": True}, {"max_tokens_per_batch": 512}):
        with pytest.raises(UserError, match=r"data\.group_by_length"):
            InstructionDataModule("x", student=student, group_by_length=True, **settings, **other)
