"""Text from outside that may not be text: file names and arguments are bytes to the system."""

from __future__ import annotations


def is_utf8(text: str) -> bool:
    """Whether text can be kept in a file: not if it holds stray bytes or halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Text that can be printed and kept: bytes that are not UTF-8 stand as ``\\xff``."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a character, as an escape in YAML or JSON can write it
        return text.encode("utf-8", "backslashreplace").decode()
