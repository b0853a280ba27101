"""The storage of teacher states: exact, checked, resumable, keyed by everything that matters."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dskd_lightning.data import InstructionDataModule
from dskd_lightning.errors import UserError
from dskd_lightning.models.loading import load_teacher
from dskd_lightning.models.output import decoder_hidden, language_head
from dskd_lightning.models.spec import StudentSpec, TeacherSpec
from dskd_lightning.structures import Head
from dskd_lightning.teacher_cache import (
    Layout,
    Manifest,
    StorageError,
    TeacherCacheSettings,
    TeacherHead,
    TeacherStates,
    attach,
    build,
    codecs,
    ensure_caches,
    is_complete,
)
from dskd_lightning.teacher_cache.build import StateBuilder
from dskd_lightning.teacher_cache.codecs import bytes_per_token, decode, encode
from dskd_lightning.teacher_cache.identity import Memory, source_fingerprint

WORDS = ["apples", "pears", "plums", "naïve", "🙂", "café", "fox", "12345", "dog"]


@pytest.fixture
def make(model_folder, tmp_path: Path):
    """``make(...)`` -> a datamodule with a teacher of another tokenizer and small shards."""
    rng = np.random.default_rng(0)
    rows = [
        {"instruction": f"Say {i}.", "input": "", "output": " ".join(rng.choice(WORDS, rng.integers(1, 12)))}
        for i in range(23)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))

    def datamodule(**arguments) -> InstructionDataModule:
        defaults = {
            "train": str(path),
            "student": StudentSpec(model_folder()),
            "teacher": TeacherSpec(model_folder(tokenizer="sentencepiece", hidden=24, add_bos=True)),
            "max_length": 128,
            "max_prompt_length": 64,
            "batch_size": 4,
            "cache_dir": str(tmp_path / "cache"),
            "teacher_cache": TeacherCacheSettings(dtype="float32", tokens_per_batch=256),
        }
        return InstructionDataModule(**{**defaults, **arguments})

    return datamodule


@pytest.fixture(autouse=True)
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(build, "_SHARD_TOKENS", 100)


def ensure(dm: InstructionDataModule, **arguments) -> list[TeacherHead] | None:
    return ensure_caches(dm, dm.teachers, ("train",), **arguments)


def cache_folder(dm: InstructionDataModule) -> Path:
    return dm.teacher_hidden["train"][0].folder


@pytest.mark.parametrize("teacher_dtype", ["float32", "bfloat16"])
def test_states_and_logits_are_the_teachers_own(make, teacher_dtype: str) -> None:
    spec = dataclasses.replace(make().teachers[0], dtype=teacher_dtype)
    dm = make(teacher=spec, teacher_cache=TeacherCacheSettings(dtype=teacher_dtype, tokens_per_batch=1))
    (head,) = ensure(dm)
    states = dm.teacher_hidden["train"][0]
    assert len(list(states.folder.glob("shard-*"))) > 2
    teacher = load_teacher(spec)
    collate = dm.train_dataloader().collator
    with torch.no_grad():
        for example in range(23):  # one a batch, as they were computed with tokens_per_batch=1
            batch = collate([[example]])
            (tokens,) = batch.teachers
            expected = tokens.select(decoder_hidden(teacher, tokens))
            found = batch.teacher_hidden[0]
            assert found.dtype == expected.dtype == getattr(torch, teacher_dtype)
            assert torch.equal(found, expected)
            logits = teacher(input_ids=tokens.input_ids, position_ids=tokens.position_ids).logits
            assert torch.equal(language_head(head).logits(found), tokens.select(logits))


def test_batches_of_other_examples_change_rounding_alone(make) -> None:
    one, many = (
        make(),
        make(teacher_cache=TeacherCacheSettings(dtype="float32", tokens_per_batch=1, folder="x")),
    )
    many.teacher_cache.folder = str(one.cache_dir / "other")
    ensure(one), ensure(many)
    for a, b in zip(*(dm.teacher_hidden["train"][0].get(range(23)) for dm in (one, many)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [{}, {"max_tokens_per_batch": 256}, {"packing": True, "batch_size": 2}])
def test_loaders_hand_out_the_states_of_their_rows(make, mode: dict) -> None:
    dm = make(**mode)
    ensure(dm)
    teacher = load_teacher(dm.teachers[0])
    seen = 0
    for batch in dm.train_dataloader():
        with torch.no_grad():
            expected = batch.teachers[0].select(decoder_hidden(teacher, batch.teachers[0]))
        torch.testing.assert_close(batch.teacher_hidden[0], expected, rtol=1e-5, atol=1e-5)
        seen += len(batch)
    assert seen == 23


def test_workers_map_the_files_themselves(make) -> None:
    dm = make(num_workers=1)
    ensure(dm)
    states = dm.teacher_hidden["train"][0]
    expected = states.get([3, 20])
    copy = pickle.loads(pickle.dumps(states))
    assert not copy._shards
    assert all(map(torch.equal, copy.get([3, 20]), expected))
    for batch in dm.train_dataloader():
        assert torch.equal(batch.teacher_hidden[0], torch.cat(states.get(batch.examples.tolist())))


def test_the_head_is_read_without_a_decoder(make, monkeypatch) -> None:
    dm = make()
    (built,) = ensure(dm)
    for place in (attach, attach.load_teacher_head.__globals__):
        name = "load_teacher"
        monkeypatch.setitem(place if isinstance(place, dict) else place.__dict__, name, None)
    again = make()
    (head,) = ensure(again)
    vocab, hidden = head.get_output_embeddings().weight.shape
    assert sum(p.numel() for p in head.parameters()) == 2 * vocab * hidden
    assert not any(p.requires_grad for p in head.parameters())
    for name, value in built.state_dict().items():
        assert torch.equal(value, head.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_head_of_tied_and_untied_models(model_folder, kind: str, dtype: str) -> None:
    spec = TeacherSpec(model_folder(kind=kind), dtype=dtype)
    teacher = load_teacher(spec)
    head = attach.load_teacher_head(spec)
    assert torch.equal(head.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert torch.equal(head.get_output_embeddings().weight, teacher.get_output_embeddings().weight)
    tied = head.get_output_embeddings().weight is head.get_input_embeddings().weight
    assert tied == (kind == "gpt2")
    assert attach.head_fingerprint(head) == attach.head_fingerprint(teacher)


def test_a_checkpoint_without_the_models_prefix(model_folder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bare"
    shutil.copytree(model_folder(kind="gpt2"), folder)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    head = attach.load_teacher_head(TeacherSpec(str(folder)))
    assert torch.equal(head.embeddings.weight, tensors["transformer.wte.weight"])


# --- the key ------------------------------------------------------------------------------------


def changed_weights(dm: InstructionDataModule, folder: Path) -> None:
    """Another value deep in the decoder, the head as it was."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def changed_tokenizer(dm: InstructionDataModule, folder: Path) -> None:
    config = json.loads((folder / "tokenizer.json").read_text())
    config["added_tokens"].append({**config["added_tokens"][-1], "id": 10**6, "content": "<|new|>"})
    config["added_tokens"][-1]["id"] = max(t["id"] for t in config["added_tokens"][:-1]) + 0
    config["added_tokens"].pop()
    config["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(config))


CHANGES = {
    "teacher weights": changed_weights,
    "tokenizer": changed_tokenizer,
    "template": lambda dm, _: setattr(dm.teachers[0], "prompt_template", "Q: {prompt}\nA: "),
    "teacher dtype": lambda dm, _: setattr(dm.teachers[0], "dtype", "bfloat16"),
    "cache dtype": lambda dm, _: setattr(dm.teacher_cache, "dtype", "int8"),
    "data or truncation": lambda dm, _: setattr(dm, "max_length", 24) or setattr(dm, "max_prompt_length", 12),
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_mismatch_names_its_part(make, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(make().teachers[0].source, folder)
    old = make(teacher=TeacherSpec(str(folder)))
    ensure(old)
    dm = make(teacher=TeacherSpec(str(folder)))
    dm.teacher_cache = TeacherCacheSettings(dtype="float32", build=False)
    ensure(dm)  # nothing changed
    changed = make(teacher=TeacherSpec(str(folder)))
    changed.teacher_cache = TeacherCacheSettings(dtype="float32", build=False)
    CHANGES[part](changed, folder)
    with pytest.raises(UserError, match=r"the nearest one differs in: [^;]*" + part):
        ensure(changed)
    assert ensure(changed, required=False) is None
    changed.teacher_cache.build = True
    ensure(changed)
    assert cache_folder(changed) != cache_folder(old)


def test_changed_data_are_another_cache(make) -> None:
    dm = make()
    ensure(dm)
    path = Path(dm.sources["train"])
    path.write_text(path.read_text().replace("Say 3.", "Say three."))
    with pytest.raises(UserError, match=r"differs in: data or truncation; its source.* max_length: 128"):
        ensure(make(teacher_cache=TeacherCacheSettings(dtype="float32", build=False)))


def test_students_with_one_view_of_the_teacher_share_a_cache(make, model_folder) -> None:
    first, second = make(), make(student=StudentSpec(model_folder(tokenizer="unigram")))
    ensure(first), ensure(second)
    assert first.examples("train").dataset.folder != second.examples("train").dataset.folder
    assert cache_folder(first) == cache_folder(second)


def test_nothing_there(make) -> None:
    with pytest.raises(UserError, match=r"No complete teacher cache.*there is none.*dskd cache"):
        ensure(make(teacher_cache=TeacherCacheSettings(build=False)))
    with pytest.raises(UserError, match="holds no teacher cache"):
        TeacherStates(make().cache_dir)


def test_another_head_is_refused(make) -> None:
    dm = make()
    ensure(dm)
    folder = cache_folder(dm)
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, head="other").write(folder)
    with pytest.raises(UserError, match="isn't the one that the teacher cache"):
        ensure(make())


def test_an_unfinished_cache_of_other_weights_is_refused(make) -> None:
    dm = make()
    ensure(dm)
    folder = cache_folder(dm)
    next(folder.glob("shard-*")).unlink()
    dataclasses.replace(Manifest.read(folder), weights="other").write(folder)
    with pytest.raises(UserError, match="begun with other weights"):
        ensure(make())


# --- damage, kills, ranks, disks ----------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: flip(path, -5), "its checksum differs"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: flip(path, 3), "damaged"),
        (lambda path: shutil.copy(path.with_name("shard-00000.safetensors"), path), "wrong size"),
    ],
)
def test_a_damaged_shard_is_named_and_can_be_replaced(make, damage, reason: str) -> None:
    dm = make()
    ensure(dm)
    path = cache_folder(dm) / "shard-00001.safetensors"
    good = path.read_bytes()
    damage(path)
    with pytest.raises(UserError, match=rf"shard-00001\.safetensors.*{reason}.*delete that file"):
        ensure(make())
    path.unlink()
    ensure(make())
    assert path.read_bytes() == good


def test_a_shard_of_another_cache_is_refused(make) -> None:
    one, other = make(), make(max_length=100)
    ensure(one)
    other.teacher_cache.dtype = "bfloat16"
    ensure(other)
    shutil.copy(cache_folder(other) / "shard-00000.safetensors", cache_folder(one))
    with pytest.raises(UserError, match="belongs to another cache"):
        ensure(make())


@pytest.mark.parametrize("name", ["tokens.npy", "manifest.json"])
def test_a_damaged_index_is_named(make, name: str) -> None:
    dm = make()
    ensure(dm)
    (cache_folder(dm) / name).write_bytes(b"{")
    with pytest.raises(UserError, match=name.replace(".", r"\.") + ".*delete"):
        ensure(make())


def test_a_changed_count_is_the_indexs_fault_and_the_advice_helps(make) -> None:
    dm = make()
    ensure(dm)
    folder = cache_folder(dm)
    tokens = np.load(folder / "tokens.npy")
    tokens[3] += 1
    np.save(folder / "tokens.npy", tokens)
    with pytest.raises(UserError, match=rf"tokens\.npy.*delete the folder '{folder}'"):
        ensure(make())
    shutil.rmtree(folder)
    ensure(make())


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float33"},
        {"teacher_dtype": "float33"},
        {"teacher_dtype": "float16"},
        {"teacher_dtype": 3},
        {"hidden_size": "x"},
        {"shard_tokens": 0},
        {"parts": [1]},
        {"index_crc32": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_crafted_manifest_is_refused(make, changes: dict, sealed: bool) -> None:
    spec = make().teachers[0]
    typed = dataclasses.replace(spec, dtype="float32")
    ensure(make(teacher=typed))
    folder = cache_folder_of(make, typed)
    values = json.loads((folder / "manifest.json").read_text()) | changes
    if not sealed:  # as old versions wrote it, or someone who knows how
        values.pop("crc32", None)
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="delete"):
        ensure(make(teacher=typed))


def test_a_changed_digit_of_a_manifest_is_seen(make) -> None:
    spec = dataclasses.replace(make().teachers[0], dtype="float32")
    ensure(make(teacher=spec))
    path = cache_folder_of(make, spec) / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"shard_tokens": values["shard_tokens"] + 1}))
    with pytest.raises(UserError, match=r"manifest\.json: isn't as it was written .* delete"):
        ensure(make(teacher=spec))


def cache_folder_of(make, teacher: TeacherSpec) -> Path:
    dm = make(teacher=teacher)
    ensure(dm)
    return cache_folder(dm)


def test_a_teacher_replaced_with_its_old_size_and_time_is_seen(make, model_folder, tmp_path: Path) -> None:
    first, second = (model_folder(tokenizer="sentencepiece", hidden=24, seed=seed) for seed in (0, 1))
    folder = tmp_path / "teacher"
    shutil.copytree(first, folder)
    ensure(make(teacher=TeacherSpec(str(folder))))
    old, new = folder / "model.safetensors", Path(second, "model.safetensors")
    times = old.stat()
    assert new.stat().st_size == times.st_size
    shutil.copyfile(new, old)
    os.utime(old, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="differs in: teacher weights"):
        ensure(make(teacher=TeacherSpec(str(folder)), teacher_cache=TeacherCacheSettings(build=False)))


def test_a_large_file_is_sampled_all_over(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    content = bytearray(8 * 2**20)
    path.write_bytes(content)
    times = path.stat()
    memory = Memory(tmp_path / "known.json")
    before = memory.file(path)
    assert memory.file(path) == before
    for start in (0, 3 * 2**20 + 17, len(content) - 1):  # a tensor of 64 kB, or the last byte
        changed = bytearray(content)
        changed[start : start + 65536] = b"x" * min(65536, len(content) - start)
        path.write_bytes(changed)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert Memory(tmp_path / "known.json").file(path) != before


def test_an_adapters_base_is_part_of_the_teacher(tmp_path: Path, model_folder) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_folder(), tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2))
    model.save_pretrained(tmp_path / "adapter")
    spec = TeacherSpec(str(tmp_path / "adapter"))
    before = source_fingerprint(spec, Memory(tmp_path / "known.json"))
    flip(tmp_path / "base/model.safetensors", -3)
    assert source_fingerprint(spec, Memory(tmp_path / "known.json")) != before


def test_a_killed_build_goes_on(make, monkeypatch) -> None:
    whole = make()
    ensure(whole)
    folder = cache_folder(whole)
    expected = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    shutil.rmtree(folder)
    states, done = StateBuilder.states, []

    def killed(self, teacher, shard, progress=None):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard)
        return states(self, teacher, shard)

    monkeypatch.setattr(StateBuilder, "states", killed)
    with pytest.raises(KeyboardInterrupt):
        ensure(make())
    assert {path.name for path in folder.glob("shard-*")} == set(sorted(expected)[:2])
    assert not is_complete(folder)
    (folder / ".shard-00002.safetensors.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="it is incomplete"):
        ensure(make(teacher_cache=TeacherCacheSettings(dtype="float32", build=False, tokens_per_batch=256)))

    again: list[int] = []
    monkeypatch.setattr(
        StateBuilder, "states", lambda self, t, shard, _: again.append(shard) or states(self, t, shard)
    )
    ensure(make())
    assert again == list(range(2, len(expected)))
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == expected


def test_ranks_share_the_shards(make) -> None:
    dm = make()
    ensure(dm)
    folder = cache_folder(dm)
    expected = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    for path in folder.glob("shard-*"):
        path.unlink()
    manifest = Manifest.read(folder)
    layout = Layout(np.load(folder / "tokens.npy"), manifest.shard_tokens)
    builder = StateBuilder(folder, manifest, layout, dm.examples("train").dataset, 1, 1, 256)
    teacher = load_teacher(dm.teachers[0])
    for rank in range(2):
        builder.build(teacher, rank, 2)
        names = {path.name for path in folder.glob("shard-*")}
        assert names == {f"shard-{i:05d}.safetensors" for i in range(layout.shards) if i % 2 <= rank}
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == expected


def test_a_small_disk_is_refused_before_computing(make, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 60 * 2**20))
    monkeypatch.setattr(StateBuilder, "states", None)
    with pytest.raises(UserError, match=r"needs 67\.2 MB .*62\.9 MB are free.*another disk"):
        ensure(make())


def test_size_and_progress_are_told(make, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="dskd_lightning"):
        ensure(make())
    text = caplog.text
    assert "23 examples" in text
    assert "(100%)" in text
    assert "exact on" in text


def test_an_unwritable_folder(make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings_ = TeacherCacheSettings(folder=str(tmp_path / "file" / "x"))
    with pytest.raises((UserError), match="file"):
        ensure(make(teacher_cache=settings_))


# --- codecs and layout --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11), ("int8", 0.01), ("int4", 0.1)],
)
def test_codecs_lose_what_their_type_loses(dtype: str, bound: float) -> None:
    hidden = torch.randn(50, 64)
    hidden[3] = 0
    stored = encode(hidden, dtype)
    statistics = 0 if bound < 0.01 else 2 * 64 * 4
    held = sum(t.numel() * t.element_size() for t in stored.values()) - statistics
    assert held == 50 * bytes_per_token(64, dtype)
    found = decode(stored, slice(0, 50), torch.float32)
    assert float((found - hidden).norm() / hidden.norm()) <= bound
    assert torch.equal(decode(stored, slice(7, 9), torch.float32), found[7:9])
    error = StorageError()
    head = Head(torch.randn(30, 64) / 8)
    error.update(hidden, found, head)
    assert error.relative == pytest.approx(float((found - hidden).norm() / hidden.norm()), rel=1e-4, abs=1e-9)
    p, q = (head.logits(h).double().log_softmax(-1) for h in (hidden, found))
    assert error.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.05, abs=1e-6)
    assert ("exact" in str(error)) == (bound == 0)


_NORMAL_FLOAT = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
"""As the paper prints them (arXiv 2305.14314, appendix E)."""


def nearest_levels(hidden: Tensor, group: int, levels: Tensor) -> Tensor:
    """In float64: each value at the nearest level of its group, in deviations from its dimension's mean."""
    wide = hidden.double()
    mean, deviation = wide.mean(0), wide.std(0, correction=0)
    deviation[deviation == 0] = 1
    scaled = (wide - mean) / deviation
    rows = []
    for row in scaled:
        values = []
        for part in row.split(group):
            steps = levels * part.abs().max()
            values.append(steps[(part[:, None] - steps).abs().argmin(dim=1)])
        rows.append(torch.cat(values))
    return torch.stack(rows) * deviation + mean


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["int8", "int4"]), st.integers(1, 9), st.sampled_from([1, 2, 63, 64, 65, 130]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_quantised_states_are_at_the_nearest_level(dtype: str, rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    hidden[:, 0] = 80 + 9 * hidden[:, 0]  # as one of a real model's dimensions
    hidden[:, width // 2] = 3  # one that doesn't vary
    if dtype == "int8":
        group, levels = width, torch.arange(-127, 128, dtype=torch.float64) / 127
    else:
        group, levels = 64, torch.tensor(_NORMAL_FLOAT, dtype=torch.float64)
    expected = nearest_levels(hidden, group, levels)
    found = decode(encode(hidden, dtype), slice(0, rows), torch.float64)
    deviation = hidden.double().std(0, correction=0).clamp(min=1e-30)
    excess = (found - hidden).abs() - (expected - hidden).abs()
    assert (excess <= 4e-3 * deviation + 1e-5).all()  # scales of int4 are rounded to float16
    assert torch.equal(found[:, width // 2], torch.full((rows,), 3.0, dtype=torch.float64))


def test_a_few_large_dimensions_cost_the_others_nothing() -> None:
    """As real last hidden states have them: one scale for all would leave the small ones few steps."""
    hidden = torch.randn(400, 128)
    hidden[:, 5] = 200 + 30 * hidden[:, 5]
    small = torch.arange(128) != 5
    for dtype, bound in (("int8", 0.01), ("int4", 0.1)):
        found = decode(encode(hidden, dtype), slice(0, 400), torch.float32)
        assert (found - hidden)[:, small].norm() / hidden[:, small].norm() < bound
        assert (found - hidden)[:, 5].norm() / 30 / 20 < bound


def test_rows_are_quantised_in_blocks_as_at_once(monkeypatch) -> None:
    half = torch.randint(-9, 10, (25, 70)).float()
    hidden = torch.cat((half, -half))  # whole numbers with mean 0: any order of summing is exact
    for dtype in ("int8", "int4"):
        once = encode(hidden, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(codecs, "_ROWS", 7)
            blocks = encode(hidden, dtype)
        assert {name: tensor.tolist() for name, tensor in blocks.items()} == {
            name: tensor.tolist() for name, tensor in once.items()
        }


def test_no_rows_are_no_rows() -> None:
    for dtype in ("bfloat16", "int8", "int4"):
        assert decode(encode(torch.empty(0, 6), dtype), slice(0, 0), torch.float32).shape == (0, 6)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e6, "float16"), (float("nan"), "bfloat16"), (float("inf"), "int8"), (float("nan"), "int4")],
)
def test_values_that_do_not_fit_are_refused(value: float, dtype: str) -> None:
    hidden = torch.ones(2, 3)
    hidden[1, 1] = value
    with pytest.raises(UserError, match=f"teacher_cache.dtype: {dtype}"):
        encode(hidden, dtype)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 100))
def test_layout_places_every_example_once(tokens: list[int], most: int) -> None:
    layout = Layout(np.array(tokens, np.int32), most)
    assert sum(layout.tokens(shard) for shard in range(layout.shards)) == layout.total == sum(tokens)
    at = 0
    for shard in range(layout.shards):
        examples = layout.examples(shard)
        assert len(examples) == 1 or layout.tokens(shard) <= most
        row = 0
        for example in examples:
            assert example == at
            assert layout.place(example) == (shard, slice(row, row + tokens[example]))
            row, at = row + tokens[example], at + 1
        assert row == layout.tokens(shard)
    assert at == len(tokens)
