"""Generated responses on disk: one JSON line each, resumable while they are written."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dskd_lightning.errors import UserError
from dskd_lightning.files import sealed, unsealed

__all__ = ["Prediction", "check_complete", "describe_problems", "prediction_file", "read_predictions"]

logger = logging.getLogger(__name__)

_LARGEST = 1 << 63
_REMEDY = "delete the file and generate it again"


@dataclass(frozen=True)
class Prediction:
    """One generated response and what it is judged against.

    Args:
        index: position of the prompt in its dataset.
        prompt: the prompt as shown to people.
        references: the accepted responses; scores take the best of them.
        response: the generated text.
        seed: the sampling seed, or None for greedy decoding.
        tokens: generated tokens, the end token not counted.
        finished: whether the model ended the response itself, within the length limit.
        fields: what else the prompt's record holds.
    """

    index: int
    prompt: str
    references: tuple[str, ...]
    response: str
    seed: int | None = None
    tokens: int = 0
    finished: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_json(cls, line: str, where: str, *, share: bool = True) -> Prediction:
        """Parse one line of a predictions file.

        Args:
            line: of the file.
            where: names it in errors.
            share: keep one copy of a prompt and of a reference, for predictions that stay in memory.

        Raises:
            UserError: the line is no JSON object, a field is missing, unknown or of a wrong type, or they
                aren't what was written.
        """
        try:
            values: dict[str, Any] = unsealed(json.loads(line), where, _REMEDY)
            if not isinstance(values.get("references"), list):
                raise TypeError("references must be a list of texts")
            values["references"] = tuple(values["references"])
            if share:
                values["references"] = tuple(map(_shared, values["references"]))
                values["prompt"] = _shared(values["prompt"])
            prediction = cls(**values)
            texts = (prediction.prompt, prediction.response, *prediction.references)
            counts = (prediction.index, prediction.tokens, 0 if prediction.seed is None else prediction.seed)
            if (
                not all(type(count) is int and abs(count) < _LARGEST for count in counts)
                or not all(isinstance(text, str) for text in texts)
                or not isinstance(prediction.finished, bool)
                or not isinstance(prediction.fields, dict)
            ):
                raise TypeError(
                    "index, tokens and seed must be an integer; prompt, response and references text; "
                    "finished true or false; fields an object"
                )
        except UserError:
            raise
        except RecursionError as error:
            raise UserError(f"{where}: not a prediction (nested too deep); delete the file.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise UserError(
                f"{where}: not a prediction ({error}); each line must be a JSON object with {names}."
            ) from error
        return prediction

    def to_json(self) -> str:
        """One line of JSON with a checksum, without the line break."""
        values = asdict(self)
        if not self.fields:
            del values["fields"]
        return json.dumps(sealed(values), ensure_ascii=False)


def prediction_file(seed: int | None) -> str:
    """Name of the file of one seed: ``seed_10.jsonl``, or ``greedy.jsonl``."""
    return "greedy.jsonl" if seed is None else f"seed_{seed}.jsonl"


def read_predictions(path: str | os.PathLike[str], expected: Iterable[int] | None = None) -> list[Prediction]:
    """All predictions of a finished file, by ascending index.

    Args:
        path: the file.
        expected: indices that must all be there; None checks for duplicates only.

    Raises:
        UserError: the file is unreadable, a line malformed, a prediction missing or duplicated.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            predictions = [
                Prediction.from_json(line, f"{path}:{number}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as predictions ({error}).") from error
    if not predictions:
        raise UserError(f"{path}: holds no predictions; generate them again with `dskd predict`.")
    predictions.sort(key=lambda prediction: prediction.index)
    check_complete([prediction.index for prediction in predictions], expected, str(path))
    return predictions


def check_complete(indices: Iterable[int], expected: Iterable[int] | None, where: str) -> None:
    """Every prompt answered exactly once.

    Args:
        indices: of the predictions.
        expected: indices that must all be there; None checks for duplicates only.
        where: names the predictions in errors.

    Raises:
        UserError: a prediction is duplicated, missing or not asked for.
    """
    found = np.sort(np.fromiter(indices, np.int64))
    duplicates = np.unique(found[1:][found[1:] == found[:-1]])
    if len(duplicates):
        raise UserError(
            f"{where}: {len(duplicates)} prompts are answered more than once (index {_list(duplicates)}); "
            "delete the file and generate it again."
        )
    if expected is None:
        return
    wanted = np.unique(np.fromiter(expected, np.int64))
    missing, unknown = np.setdiff1d(wanted, found), np.setdiff1d(found, wanted)
    if len(missing):
        raise UserError(
            f"{where}: {len(missing)} of {len(wanted)} predictions are missing (index {_list(missing)}); "
            "run `dskd predict` again, which resumes where it stopped."
        )
    if len(unknown):
        raise UserError(
            f"{where}: {len(unknown)} predictions belong to no prompt (index {_list(unknown)}); "
            "they come from another dataset: delete the file and generate it again."
        )


def describe_problems(predictions: Sequence[Prediction]) -> list[str]:
    """Sentences about empty and endless responses; an empty list where there are none."""
    total = len(predictions)
    empty = sum(not prediction.response.strip() for prediction in predictions)
    endless = sum(not prediction.finished for prediction in predictions)
    problems = []
    if empty:
        problems.append(
            f"{empty} of {total} responses are empty: the model ends at once; check its prompt template."
        )
    if endless:
        problems.append(
            f"{endless} of {total} responses hit the length limit: raise max_new_tokens, or check that the "
            "model learnt its end-of-sequence token."
        )
    return problems


def _shared(text: Any) -> Any:
    """The one copy of a text that all seeds and runs have in common."""
    return sys.intern(text) if type(text) is str else text


def _list(indices: npt.NDArray[np.int64], limit: int = 5) -> str:
    shown = ", ".join(str(index) for index in indices[:limit])
    return shown + (", ..." if len(indices) > limit else "")
