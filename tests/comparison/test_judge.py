from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from served import served

from dskd_lightning.comparison.endpoint import ChatEndpoint, EndpointError
from dskd_lightning.comparison.judge import CostLimit, judge_pairs, judgement_counts
from dskd_lightning.errors import UserError
from dskd_lightning.runs.predictions import Prediction

Answer = Callable[[str, int], tuple[int, str]]


class FakeServer:
    """An OpenAI-compatible server on this machine; ``answer(question, number)`` gives status and text."""

    def __init__(self) -> None:
        self.answer: Answer = lambda question, number: (200, "VERDICT: TIE")
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append({"path": self.path, **dict(self.headers)})
                status, text = outer.answer(body["messages"][1]["content"], len(outer.requests))
                reply = {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 50}}
                data = json.dumps(reply).encode() if text != "garbage" else b"<html>"
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    with served(fake.server):
        yield fake


def endpoint(server: FakeServer, **options) -> ChatEndpoint:
    return ChatEndpoint(server.url, "judge", sleep=lambda seconds: None, **options)


def pairs(count: int = 4) -> tuple[list[Prediction], list[Prediction]]:
    made = [
        [Prediction(i, f"prompt {i}", (), f"{name} {i}") for i in range(count)] for name in ("old", "new")
    ]
    return made[0], made[1]


def prefers(word: str) -> Answer:
    def answer(question: str, number: int) -> tuple[int, str]:
        first = question.partition("<response_a>")[2].partition("</response_a>")[0]
        return 200, f"Thinking VERDICT: B... no.\nVERDICT: {'A' if word in first else 'B'}"

    return answer


def test_both_orders_count(server, tmp_path) -> None:
    server.answer = prefers("new")
    summary = judge_pairs(endpoint(server), *pairs(), tmp_path / "judge.jsonl")
    assert summary.counts == {"candidate": 4, "tie": 0, "baseline": 0, "inconsistent": 0, "unreadable": 0}
    assert len(server.requests) == 8
    assert server.headers[0]["path"] == "/v1/chat/completions"


def test_a_judge_that_prefers_a_position_gives_ties(server, tmp_path) -> None:
    server.answer = lambda question, number: (200, "VERDICT: A")
    summary = judge_pairs(endpoint(server), *pairs(), tmp_path / "judge.jsonl")
    assert (summary.counts["tie"], summary.counts["inconsistent"]) == (4, 4)


def test_unreadable_verdicts_are_counted(server, tmp_path) -> None:
    server.answer = lambda question, number: (200, "I cannot say")
    assert judge_pairs(endpoint(server), *pairs(2), tmp_path / "j").counts["unreadable"] == 4


def test_retries_then_succeeds(server, tmp_path) -> None:
    waits: list[float] = []
    replies = {1: (503, ""), 2: (429, ""), 3: (200, "garbage")}
    server.answer = lambda question, number: replies.get(number, (200, "VERDICT: TIE"))
    chat = ChatEndpoint(server.url, "judge", sleep=waits.append)
    assert judge_pairs(chat, *pairs(1), tmp_path / "j").counts["tie"] == 1
    assert waits == [1.0, 2.0, 4.0]


def test_an_endpoint_that_fails_midway_keeps_what_was_judged(server, tmp_path, caplog) -> None:
    good = prefers("old")
    server.answer = lambda question, number: good(question, number) if number <= 5 else (500, "")
    path = tmp_path / "judge.jsonl"
    summary = judge_pairs(endpoint(server, retries=1), *pairs(), path)
    assert len(summary.judgements) == 2
    assert "failed after 2 attempts (HTTP 500" in str(summary.stopped)
    assert "stopped after 2 of 4 prompts" in caplog.text
    server.answer, asked = good, len(server.requests)
    summary = judge_pairs(endpoint(server), *pairs(), path)
    assert summary.stopped is None
    assert summary.counts["baseline"] == 4
    assert len(server.requests) - asked == 4


def test_a_refused_key_is_not_retried(server, tmp_path) -> None:
    server.answer = lambda question, number: (401, "")
    summary = judge_pairs(endpoint(server), *pairs(), tmp_path / "j")
    assert "HTTP 401" in str(summary.stopped)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("limit", "judged"), [(CostLimit(requests=5), 2), (CostLimit(tokens=150), 2), (CostLimit(requests=1), 0)]
)
def test_cost_limits(server, tmp_path, limit, judged) -> None:
    summary = judge_pairs(endpoint(server), *pairs(), tmp_path / "j", limit=limit)
    assert len(summary.judgements) == judged
    assert "is reached" in str(summary.stopped)
    assert len(server.requests) == 2 * judged


def test_the_key_comes_from_the_environment(server, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="JUDGE_KEY is not set"):
        endpoint(server, api_key_variable="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "value")
    judge_pairs(endpoint(server, api_key_variable="JUDGE_KEY"), *pairs(1), tmp_path / "j")
    assert server.headers[0]["Authorization"] == "Bearer value"


@pytest.fixture
def raw_server() -> Iterator[Callable[..., str]]:
    """``raw_server(reply)`` -> URL of a server whose ``reply(handler)`` writes what it likes."""
    servers = contextlib.ExitStack()

    def make(reply: Callable[[BaseHTTPRequestHandler], None]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    reply(self)

            do_POST = do_GET

            def log_message(self, *args: object) -> None:
                pass

        return f"{servers.enter_context(served(ThreadingHTTPServer(('127.0.0.1', 0), Handler)))}/v1"

    with servers:
        yield make


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_take_the_key_along(raw_server, monkeypatch, status) -> None:
    monkeypatch.setenv("JUDGE_KEY", "value")
    seen: list[str] = []
    other = raw_server(lambda handler: seen.append(handler.headers.get("Authorization")))

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Location", other)
        handler.end_headers()

    chat = ChatEndpoint(raw_server(redirect), "judge", "JUDGE_KEY", retries=0)
    with pytest.raises(EndpointError, match=f"HTTP {status}.*redirect"):
        chat.complete("", "")
    assert seen == []


@pytest.mark.parametrize("part", ["headers", "body", "refusal", "redirect"])
def test_a_reply_that_never_ends_is_given_up(raw_server, part) -> None:
    status = {"refusal": b"401", "redirect": b"302"}.get(part, b"200")

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 " + status + b" OK\r\n" + (b"X: " if part == "headers" else b"\r\n"))
        for _ in range(400):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    chat = ChatEndpoint(raw_server(drip), "judge", retries=0, timeout=0.3)
    begin, before = time.monotonic(), set(threading.enumerate())
    with pytest.raises(EndpointError, match="TimeoutError"):
        chat.complete("", "")
    assert time.monotonic() - begin < 10
    threads = {thread for thread in threading.enumerate() if thread.name.endswith("(read)")} - before
    for thread in threads if part == "body" else ():
        thread.join(2)
        assert not thread.is_alive()


def test_a_key_that_a_refusal_repeats_is_not_shown(raw_server, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-1234")

    def refuse(handler: BaseHTTPRequestHandler) -> None:
        said = f"no access for {handler.headers['Authorization']}" + " at all" * 10_000
        handler.send_response(401)
        handler.end_headers()
        handler.wfile.write(said.encode())

    with pytest.raises(EndpointError, match=r"HTTP 401 Unauthorized: no access for Bearer \*\*\*") as found:
        ChatEndpoint(raw_server(refuse), "judge", "JUDGE_KEY").complete("", "")
    assert "sk-1234" not in str(found.value)
    assert len(str(found.value)) < 400


def test_a_server_may_not_make_us_wait_for_long(raw_server) -> None:
    def busy(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(429)
        handler.send_header("Retry-After", "999999")
        handler.end_headers()

    waits: list[float] = []
    with pytest.raises(EndpointError, match="after 3 attempts"):
        ChatEndpoint(raw_server(busy), "judge", retries=2, sleep=waits.append).complete("", "")
    assert waits == [60.0, 60.0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b" " * (17 << 20), "more than 16 MiB"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"choices": [{"message": {"content": ""}}], "usage": 3}', "AttributeError"),
        (b'{"choices": [{"message": {"content": ""}}], "usage": {"total_tokens": 1e999}}', "OverflowError"),
    ],
    ids=["size", "depth", "usage", "infinity"],
)
def test_a_reply_that_is_no_answer(raw_server, body, reason) -> None:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.rfile.read(int(handler.headers["Content-Length"]))  # unread, it would reset the connection
        with contextlib.suppress(ConnectionError):  # who has read enough hangs up
            handler.wfile.write(body)

    with pytest.raises(EndpointError, match=reason):
        ChatEndpoint(raw_server(reply), "judge", retries=0).complete("", "")


@pytest.mark.parametrize(
    "line",
    [b"\xff", b"[" * 100_000, b'{"index": [0], "forward": "tie", "backward": "tie", "tokens": 1}'],
    ids=["bytes", "depth", "types"],
)
def test_a_damaged_file_of_verdicts(tmp_path, line) -> None:
    (tmp_path / "j").write_bytes(line + b"\n")
    with pytest.raises(UserError, match="verdict"):
        judgement_counts(tmp_path / "j")


def test_a_changed_verdict_is_seen(server, tmp_path) -> None:
    server.answer = prefers("new")
    judge_pairs(endpoint(server), *pairs(2), tmp_path / "j")
    counts = judgement_counts(tmp_path / "j")
    lines = (tmp_path / "j").read_text().splitlines()
    (tmp_path / "j").write_text(f"{lines[0]}\n{lines[1].replace('candidate', 'baseline')}\n")
    with pytest.raises(UserError, match=r"j:2: isn't as it was written .* delete that line"):
        judgement_counts(tmp_path / "j")
    (tmp_path / "j").write_text("".join(re.sub(r', "crc32": \d+', "", line) + "\n" for line in lines))
    assert judgement_counts(tmp_path / "j") == counts  # as an earlier version wrote them


def test_bad_input(server, tmp_path) -> None:
    with pytest.raises(UserError, match="must start with http"):
        ChatEndpoint("file:///etc", "judge")
    with pytest.raises(UserError, match="different prompts"):
        judge_pairs(endpoint(server), pairs(2)[0], pairs(3)[1], tmp_path / "j")
    (tmp_path / "j").write_text("{}\n")
    with pytest.raises(UserError, match=":1: not a verdict"):
        judge_pairs(endpoint(server), *pairs(2), tmp_path / "j")
