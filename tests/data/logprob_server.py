"""A completions server of our own: a tiny model that says how likely it finds the prompt it is given."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from served import served
from transformers import AutoModelForCausalLM, AutoTokenizer


class Server:
    """What was asked, and how to answer.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures = 0  # so many requests are answered with 503
        self.fails_after: int | None = None
        self.mode = ""  # silent: no log-probabilities; other: tokens of another vocabulary
        self.url = ""
        self.lock = threading.Lock()

    @torch.no_grad()
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        log_p = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        if "prompt_logprobs" in body:
            entries: list[Any] = [None]
            for position, token in enumerate(ids[1:]):
                best = log_p[position].topk(body["prompt_logprobs"]).indices.tolist()
                kept = dict.fromkeys([token, *best])
                entries.append(
                    {
                        str(i): {"logprob": log_p[position, i].item(), "rank": 1, "decoded_token": "?"}
                        for i in kept
                    }
                )
            choice: dict[str, Any] = {"text": "x", "prompt_logprobs": entries}
            if self.mode == "silent":
                choice["prompt_logprobs"] = None
            return {"choices": [choice]}
        names = self.tokenizer.convert_ids_to_tokens(ids)
        values, tops = [None], [None]
        for position, token in enumerate(ids[1:]):
            values.append(log_p[position, token].item())
            best = log_p[position].topk(body["logprobs"]) if body["logprobs"] else None
            found = (
                {} if best is None else dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            )
            tops.append({self.tokenizer.convert_ids_to_tokens(i): value for i, value in found.items()})
        if self.mode == "other":
            names = ["strange"] * len(names)
        said = {"tokens": names, "token_logprobs": values, "top_logprobs": tops}
        return {"choices": [{"text": "", "logprobs": None if self.mode == "silent" else said}]}


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append(body)
                server.keys.append(self.headers.get("Authorization"))
                failing = server.failures > 0
                server.failures -= failing
                if server.fails_after is not None and len(server.requests) > server.fails_after:
                    failing = True
                reply = {} if failing else server.answer(body)
            data = json.dumps(reply).encode()
            self.send_response(503 if failing else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with served(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        server.url = f"{address}/v1"
        yield server
