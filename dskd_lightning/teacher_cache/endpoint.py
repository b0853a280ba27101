"""A teacher's log-probabilities of given responses, from a completions endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.http_json import EndpointError, JsonEndpoint
from dskd_lightning.models.spec import EndpointSpec
from dskd_lightning.structures import LogProbabilities
from dskd_lightning.teacher_cache.told import (
    Entry,
    Vocabulary,
    WrongVocabulary,
    entries_of,
    log_probabilities,
)

__all__ = ["CompletionsEndpoint"]


class CompletionsEndpoint:
    """Asks a server how likely it finds tokens that it is given.

    Args:
        spec: where, and how.
        name: of the model there.
        tokenizer: whose ids are sent.
    """

    def __init__(self, spec: EndpointSpec, name: str, tokenizer: Any) -> None:
        self.spec, self.name = spec, name
        self.vocabulary = Vocabulary(tokenizer)
        self._endpoint = JsonEndpoint(
            spec.base_url, spec.api_key_variable, spec.timeout, spec.retries, spec.backoff,
            who="model.teacher.endpoint", requests_per_minute=spec.requests_per_minute,
        )  # fmt: skip

    def ask(self, tokens: Sequence[int], positions: Sequence[int]) -> LogProbabilities:
        """What the teacher says of the tokens at ``positions``, each after all in front of it.

        Raises:
            UserError: no log-probabilities, another vocabulary, or no answer after all retries.
        """
        body: dict[str, Any] = {"model": self.name, "prompt": list(tokens), "temperature": 0}
        if self.spec.api == "echo":
            body |= {"max_tokens": 0, "echo": True, "logprobs": self.spec.top_k}
        else:
            body |= {"max_tokens": 1, "prompt_logprobs": self.spec.top_k}
        read = self._echoed if self.spec.api == "echo" else self._of_prompt
        labels = [tokens[position] for position in positions]
        where = f"model.teacher.endpoint: {self.spec.base_url}"
        try:
            entries = self._endpoint.post("completions", body, lambda reply: read(reply, len(tokens)))
            chosen = [entries[position] for position in positions]
            return log_probabilities(chosen, labels, self.vocabulary, self.spec.top_k)
        except UserError:
            raise
        except WrongVocabulary as error:
            raise UserError(
                f"{where} answers in another vocabulary than that of the teacher's tokenizer ({error}): set "
                "model.teacher.source (or its tokenizer) to the model that is served."
            ) from error
        except ValueError as error:
            raise UserError(f"{where}: {error}: use a server that gives log-probabilities.") from error
        except EndpointError as error:
            raise UserError(
                f"model.teacher.endpoint: {error}; what was collected is kept: start again to go on."
            ) from error

    def _echoed(self, reply: Any, count: int) -> list[list[Entry]]:
        found = reply["choices"][0].get("logprobs")
        if not found or not found.get("token_logprobs"):
            raise self._silent("`echo` with `logprobs`", "prompt_logprobs")
        tokens, values = found["tokens"], found["token_logprobs"]
        if len(tokens) < count or len(values) < count:
            raise WrongVocabulary(f"{len(tokens)} tokens where {count} were sent")
        tops = found.get("top_logprobs") or [None] * len(tokens)
        return [
            [] if value is None else [(token, float(value)), *_top(top)]
            for token, value, top in zip(tokens, values, tops, strict=False)
        ][:count]

    def _of_prompt(self, reply: Any, count: int) -> list[list[Entry]]:
        found = reply["choices"][0].get("prompt_logprobs", reply.get("prompt_logprobs"))
        if not found:
            raise self._silent("`prompt_logprobs`", "echo")
        if len(found) < count:
            raise WrongVocabulary(f"{len(found)} tokens where {count} were sent")
        return [entries_of(value) for value in found][:count]

    def _silent(self, asked: str, other: str) -> UserError:
        return UserError(
            f"model.teacher.endpoint: {self.spec.base_url} answers {asked} without log-probabilities: try "
            f"`api: {other}`, or a server that gives them (vLLM does)."
        )


def _top(top: Any) -> list[Entry]:
    return [(token, float(value)) for token, value in (top or {}).items() if value is not None]
