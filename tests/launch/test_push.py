"""Uploads, to a server of this test that answers as the Hub does."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from served import served

from dskd_lightning.errors import UserError
from dskd_lightning.launch.push import push_folder


class _Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    calls: list[tuple[str, str]]
    status = 200

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.calls.append((self.path, self.headers.get("Authorization") or ""))
        address = f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
        if self.path == "/api/repos/create":
            assert json.loads(body).get("private") or json.loads(body).get("visibility") == "private"
            self._answer({"url": f"{address}/me/student", "name": "me/student"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer(
                {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{address}/me/student/commit/1", "commitOid": "1"})
        else:
            self._answer({})

    def _answer(self, value: Any) -> None:
        content = json.dumps(value if self.status == 200 else {"error": "no rights"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[_Hub]]:
    kind = type("Hub", (_Hub,), {"files": {}, "calls": []})
    with served(ThreadingHTTPServer(("127.0.0.1", 0), kind)) as address:
        make = huggingface_hub.HfApi
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: make(endpoint=address, token=token))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield kind


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "README.md").write_text("# A student\n")
    return tmp_path


def test_every_file_arrives_under_the_token_of_the_environment(hub, folder) -> None:
    assert push_folder(folder, "me/student").endswith("/me/student")
    assert hub.files == {"config.json": b'{"a": 1}', "README.md": b"# A student\n"}
    assert {token for _, token in hub.calls} == {"Bearer hf_secret"}


def test_a_refusal_is_one_sentence_without_the_token(hub, folder) -> None:
    hub.status = 403
    with pytest.raises(UserError, match=r"--push me/student: .*the student is in") as error:
        push_folder(folder, "me/student")
    assert "hf_secret" not in str(error.value)


def test_names_that_are_none_and_missing_tokens(folder, hub, monkeypatch) -> None:
    with pytest.raises(UserError, match="check the name"):
        push_folder(folder, "a/b/c")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="set the environment variable HF_TOKEN"):
        push_folder(folder, "me/student")
