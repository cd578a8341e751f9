"""A process that makes parts of a corpus: ``python -P -m step_jax.data.part_worker``.

Started by `making.py`. It reads pickles: how parts are made and where, and then a part after
another. For each it writes a line of JSON: whether the part is there, or held by another process.
An error ends it; who started it then tries the part itself. So does the end of its input.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys


def main() -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work, place = pickle.load(requests)
        while True:
            part = pickle.load(requests)
            replies.write(b"true\n" if place.attempt(work, part) else b"false\n")
            replies.flush()
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
