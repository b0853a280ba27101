"""What a teacher's states depend on, found out without loading its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers.utils.hub import cached_file

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.prepared import PreparedDataset
from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, write_object
from dskd_lightning.models.sources import adapter_base, load_errors, resolve_source
from dskd_lightning.models.spec import TeacherSpec
from dskd_lightning.models.teacher_cache_settings import CacheDtype
from dskd_lightning.teacher_cache.codecs import format_version
from dskd_lightning.tokenizers import tokenizer_fingerprint

__all__ = ["Memory", "cache_parts", "response_tokens", "source_fingerprint"]

_SAMPLES = 256
_SAMPLE_BYTES = 4096


class Memory:
    """Hashes of large files and of data, kept by path, size, time of change and a sample of the content.

    Whoever copies other weights over with the old size and time is seen by the sample, unless they
    differ in none of its bytes: `_SAMPLES` pieces all over the file, and its ends.

    Args:
        path: a JSON file; a damaged one is forgotten.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, str] = read_object(path, "")
        except UserError:
            self._known = {}

    def file(self, path: Path) -> str:
        """SHA-256 of a file's content."""
        state = path.stat()
        name = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {_sample(path, state.st_size)}"
        if name not in self._known:
            with path.open("rb") as file:
                self._keep(name, hashlib.file_digest(file, "sha256").hexdigest())
        return self._known[name]

    def data(self, dataset: PreparedDataset, model: int) -> str:
        """SHA-256 of every example's tokens for ``model`` and of which of them are responses."""
        name = f"data {dataset.fingerprint} {model}"
        if name not in self._known:
            digest = hashlib.sha256()
            for index in range(len(dataset)):
                example = dataset.rendered(index, model)
                digest.update(np.array([len(example)], "<i4").tobytes())
                digest.update(
                    example.input_ids.astype("<i4").tobytes() + example.labels.astype("<i4").tobytes()
                )
            self._keep(name, digest.hexdigest())
        return self._known[name]

    def _keep(self, name: str, value: str) -> None:
        self._known[name] = value
        write_object(self._path, self._known, indent=1)


def _sample(path: Path, size: int) -> str:
    """Hash of a small file, or of pieces of a large one, its ends among them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= 2 * _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for start in np.linspace(0, size - _SAMPLE_BYTES, _SAMPLES, dtype=np.int64).tolist():
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def response_tokens(
    dataset: PreparedDataset, model: int, answered: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """``[examples]``, response positions of each example for ``model``, 0 where it doesn't answer."""
    counts = (
        len(dataset.rendered(index, model).response) if answers else 0
        for index, answers in enumerate(answered.tolist())
    )
    return np.fromiter(counts, np.int32, len(dataset))


def source_fingerprint(spec: TeacherSpec, memory: Memory) -> str:
    """Hash of the teacher's weights as they are stored: equal files, equal fingerprint.

    Local files are hashed whole, once until they change; a Hub model is its commit.
    """
    parts = [_place(spec.source, spec.revision, memory, "config.json")]
    if spec.adapter is not None:
        parts.append(_place(spec.adapter, None, memory, "adapter_config.json"))
    return hashlib.sha256(json.dumps([*parts, spec.quantization]).encode()).hexdigest()


def _place(name: str, revision: str | None, memory: Memory, config: str) -> object:
    source = resolve_source(name)
    if source.gguf is not None:
        return memory.file(source.gguf)
    if source.local:
        folder = Path(source.location)
        files: list[object] = [[file.name, memory.file(file)] for file in _model_files(folder, config)]
        if base := adapter_base(source):  # a folder with an adapter alone, which goes on some model
            files.append(_place(base, None, memory, "config.json"))
        return files
    with load_errors("model", name, f"a folder needs {config}"):
        found = cached_file(source.location, config, revision=revision or "main")
    if found is None:
        raise UserError(f"'{name}' has no {config} on the Hub: check the id and the revision.")
    return [source.location, Path(found).parent.name]  # .../snapshots/COMMIT/config.json


def _model_files(folder: Path, config: str) -> Iterator[Path]:
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    configs = (folder / config, folder / "adapter_config.json")
    yield from (
        path for path in dict.fromkeys((*configs, *weights, *sorted(folder.glob("*.py")))) if path.is_file()
    )


def cache_parts(
    spec: TeacherSpec,
    renderer: ChatRenderer,
    dataset: PreparedDataset,
    model: int,
    dtype: CacheDtype,
    memory: Memory,
    answered: npt.NDArray[np.bool_],
) -> dict[str, str]:
    """All that the cached states depend on, by names that an error message can use.

    Truncation shows in the data: they are hashed as the teacher's tokens, so that students with
    other tokenizers share a cache where the teacher reads the same.

    Args:
        spec: the teacher.
        renderer: its tokenizer and template.
        dataset: the prepared examples.
        model: the teacher's number in them; the student is 0.
        dtype: how states are stored.
        memory: keeps hashes for the next time.
        answered: ``[examples]``, for which of them the teacher answers.
    """
    template = [renderer.prompt_template or renderer.tokenizer.chat_template, renderer.template.options]
    own = {} if renderer.system is None else {"system": renderer.system}
    if not answered.all():
        own["records of the teacher"] = hashlib.sha256(answered.tobytes()).hexdigest()
    return {
        **own,
        "teacher weights": source_fingerprint(spec, memory),
        "teacher dtype": spec.dtype,
        "tokenizer": tokenizer_fingerprint(renderer.tokenizer),
        "template": hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest(),
        "data or truncation": memory.data(dataset, model),
        "cache dtype": dtype,
        "cache version": format_version(dtype),
    }
