"""What object stores answer, in words: a server that says what the test wants it to say."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from step_jax.core import storage
from step_jax.core.errors import ConfigError, DiskFullError, StorageError
from step_jax.core.files import write_whole
from step_jax.core.storage import Objects


class Answers(ThreadingHTTPServer):
    status = 200
    asked = 0
    silent = False


class _Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self):
        self.server.asked += 1
        while self.server.silent:
            time.sleep(0.1)
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b"<Error><Code>Refused</Code></Error>"
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with Answers(("127.0.0.1", 0), _Handler) as answers:
        thread = threading.Thread(target=answers.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{answers.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setattr(storage, "RETRIES", 2)
        monkeypatch.setattr(storage, "_FIRST_DELAY", "10ms")
        for cached in (storage.context, storage._opened):
            cached.cache_clear()
        yield answers
        answers.silent = False
        answers.shutdown()
        thread.join()
        for cached in (storage.context, storage._opened):
            cached.cache_clear()


@pytest.mark.parametrize(
    ("status", "kind", "says", "tries"),
    [
        (401, ConfigError, "AWS_ACCESS_KEY_ID", 1),
        (403, ConfigError, "PutObject", 1),
        (404, ConfigError, "no such bucket", 1),
        (429, StorageError, "asked too often", 3),
        (503, StorageError, "failed or did not answer", 3),
        (507, DiskFullError, "quota", 1),
    ],
)
def test_an_answer_is_tried_again_or_not_and_says_what_to_do(server, status, kind, says, tries):
    server.status = status
    with pytest.raises(kind, match=says) as raised:
        Objects.at("s3://some-bucket/run").write("config.yaml", b"x")
    assert "cannot write s3://some-bucket/run/config.yaml" in str(raised.value)
    assert server.asked <= tries


def test_a_url_is_read_or_refused_with_what_would_do():
    there = Objects.at("gs://bucket/a/b/")
    assert (str(there), str(there / "c"), there.name) == (
        "gs://bucket/a/b",
        "gs://bucket/a/b/c",
        "b",
    )
    assert str(there.parent.parent) == "gs://bucket" and there.spec["path"] == "a/b/"
    for wrong in ("gs://", "s3:///x", "gs://b/../c", "gs://b//c"):
        with pytest.raises(ConfigError, match="://BUCKET/PATH"):
            Objects.at(wrong)
    with pytest.raises(ConfigError, match="known are gs:// and s3://"):
        Objects.at("hdfs://name/path")


def test_no_url_is_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong in ("gs://bucket/x.txt", tmp_path.__class__("s3://bucket/x.txt")):
        with pytest.raises(ConfigError, match="may be in an object store"):
            write_whole(wrong, "x")
    assert not list(tmp_path.iterdir())


def test_a_server_that_says_nothing_is_not_waited_for_without_end(server):
    """In a process of its own: TensorStore reads its limits once."""
    server.silent = True
    code = (
        "from step_jax.core import storage\n"
        "storage.RETRIES = 1\n"
        "try:\n"
        "    storage.Objects.at('s3://some-bucket/run').write('x', b'x')\n"
        "except storage.StorageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env=os.environ | {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"},
    )  # fmt: skip
    assert done.stdout.startswith("cannot write s3://some-bucket/run/x"), done.stdout + done.stderr
    assert server.asked >= 1
