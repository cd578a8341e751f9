"""A server of ``/v1/completions`` as vLLM and SGLang have it, over an exported model.

It knows nothing of the engine: full forward passes, NumPy's draws. Tokens are streamed one by one.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np

from step_jax.interop.hf import load_hf
from step_jax.models.context import Context
from step_jax.models.tokens import Tokens
from tests.models import small

LENGTH = 32


class CompletionsServer(ThreadingHTTPServer):
    """``with CompletionsServer() as server: ...``; a model is loaded by its clients."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[dict] = []
        self.loaded: list[str] = []
        self.says: dict = {"success": True}  # of weights from disk
        self.sends_token_ids, self.seconds = True, 0.0
        self.tokens_left: int | None = None  # before it hangs up
        self._lock, self._decoder, self._params = threading.Lock(), None, None

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def load(self, folder: str) -> None:
        self.loaded.append(folder)
        decoder, self._params = load_hf(folder)
        if decoder == self._decoder:
            return
        self._decoder = decoder

        @functools.partial(jax.jit, compiler_options=small.FAST_COMPILE)
        def forward(p, tokens_BT):
            ctx = Context(Tokens.in_order(*tokens_BT.shape), execution=small.execution())
            return decoder.logits(p, decoder.hidden(p, tokens_BT, ctx)[0], ctx)[0]

        self._forward = forward

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 (V,) after a text."""
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(ids)] = ids
        with self._lock:
            return np.asarray(self._forward(self._params, padded))[len(ids) - 1]


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer(200, {"data": [{"id": "policy"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/update_weights_from_disk":
            if self.server.says["success"]:
                self.server.load(body["model_path"])
            return self._answer(200, self.server.says)
        if self.path == "/collective_rpc" and body["method"] == "reload_weights":
            self.server.load(body["kwargs"]["weights_path"])
            return self._answer(200, {"results": [None]})
        if self.path == "/reset_prefix_cache":
            return self._answer(200, {})
        if self.path != "/v1/completions" or body["model"] != "policy":
            return self._answer(404, {"message": f"no model {body.get('model')}"})
        self.server.asked.append(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for token, logprob in self._written(body):
                time.sleep(self.server.seconds)
                if self.server.tokens_left == 0:
                    self.server.tokens_left = None
                    return
                if self.server.tokens_left is not None:
                    self.server.tokens_left -= 1
                choice = {"index": 0, "text": "", "logprobs": {"token_logprobs": [logprob]}}
                if self.server.sends_token_ids:
                    choice["token_ids"] = [token]
                self._event(json.dumps({"choices": [choice]}))
            self._event("[DONE]")
        except OSError:  # the client has left
            pass

    def _written(self, body):
        rng, ids = np.random.default_rng(body["seed"]), list(body["prompt"])
        for n in range(body["max_tokens"]):
            logits_V = self.server.logits(ids).astype(np.float64)
            if body["temperature"]:
                logits_V /= body["temperature"]
            shown_V = logits_V.copy()
            if n < body["min_tokens"]:
                shown_V[body["stop_token_ids"]] = -np.inf
            if body["temperature"]:
                shown_V += rng.gumbel(size=len(shown_V))
            token = int(shown_V.argmax())
            ids.append(token)
            yield token, logits_V[token] - np.logaddexp.reduce(logits_V)
            if token in body["stop_token_ids"]:
                return

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _answer(self, status: int, body: dict) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
