"""A name for contents."""

from __future__ import annotations

import hashlib
import json


def digest(*parts: bytes | object) -> str:
    """SHA-256, hex, of bytes and of JSON values; of one part of bytes that of a file."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return whole.hexdigest()
