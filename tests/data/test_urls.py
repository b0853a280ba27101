from __future__ import annotations

import pytest

from dskd_lightning.data.urls import is_url, masked, path_of, scrubbed, stable


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pass@host:80/a.jsonl", "https://***@host:80/a.jsonl"),
        ("https://TOKEN@host/a.jsonl#part", "https://***@host/a.jsonl"),
        ("https://host/a.jsonl?X-Amz-Signature=1&X-Amz-Expires=2", "https://host/a.jsonl?***"),
        (
            "https://a.blob.core.windows.net/b/c.csv?sv=1&se=2&sr=b&sp=r&sig=3",
            "https://a.blob.core.windows.net/b/c.csv?***",
        ),
        ("sftp://me:pass@host/a.jsonl", "sftp://***@host/a.jsonl"),
        ("hf://datasets/owner/name@main/a.jsonl", "hf://datasets/owner/name@main/a.jsonl"),
        ("hf://owner@v1/a.jsonl", "hf://owner@v1/a.jsonl"),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        ("owner/name@config:train", "owner/name@config:train"),
        ("./a?b@c.jsonl", "./a?b@c.jsonl"),
    ],
)
def test_secrets_are_not_shown(url: str, shown: str) -> None:
    assert masked(url) == shown
    assert masked(shown) == shown


def test_a_query_that_says_which_file_is_told_apart_but_not_shown() -> None:
    one, two = (masked(f"https://host/get.jsonl?key=abc&id={number}&sig={number}") for number in (1, 2))
    assert one != two
    assert one.startswith("https://host/get.jsonl?***")
    assert "abc" not in one
    assert one == masked("https://host/get.jsonl?sig=7&key=abc&id=1")
    assert stable("https://u:p@host/get.jsonl?id=1&sig=1") == stable("https://host/get.jsonl?sig=2&id=1")
    assert stable("https://host/get.jsonl?id=1") != stable("https://host/get.jsonl?id=2")
    assert stable("s3://a/b?c") != stable("s3://a/b?d")


def test_urls_in_messages_are_masked() -> None:
    text = "403, message='Forbidden',\n url='https://a:b@host/x?sig=1' (s3://bucket/y) http://h/?token=2"
    assert (
        scrubbed(text)
        == "403, message='Forbidden', url='https://***@host/x?***' (s3://bucket/y) http://h/?***"
    )


def test_what_is_a_url() -> None:
    assert all(map(is_url, ("s3://a/b", "file:///a")))
    assert not any(map(is_url, ("C:\\a", "owner/name:train", "a/b://c", "demo")))
    assert path_of("https://host/a%20b.jsonl?x=1") == "/a b.jsonl"
    assert path_of("s3://bucket/a.jsonl") == "bucket/a.jsonl"
