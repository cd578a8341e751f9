"""The texts of the literature master: real prose and verse out of Debian packages, split for good.

    python benchmarks/literature/texts.py WORK

downloads the packages with ``apt-get download``, unpacks them with ``dpkg -x`` below WORK (nothing
is installed) and writes passages as JSONL. Needs a Debian or Ubuntu with ``apt-get`` and ``dpkg``;
the King James text is unpacked by the program that comes with it (``bible-kjv``, x86-64).

| package | text | licence |
|---|---|---|
| bible-kjv-text | King James Bible, 1611 | public domain |
| r-cran-janeaustenr | the six novels of Jane Austen | public domain |
| dict-foldoc | dictionary of computing | GFDL |
| dict-jargon | the Jargon File | public domain |
| fortunes | short modern texts | collected quotations, package under BSD |

Which text is seen by whom (no passage is in two of them):

| file | text | who reads it |
|---|---|---|
| general/ | Emma, Mansfield Park, Northanger Abbey, Persuasion; both dictionaries | pretraining |
| style/ | Genesis to Malachi | continued pretraining, fine-tuning, preference tuning |
| judges.json | Matthew to Acts; Pride and Prejudice; every other fortune | both judges |
| prompts.json | Romans to Revelation; Sense and Sensibility; other fortunes | held-out prompts |
"""

from __future__ import annotations

import gzip
import json
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "bible-kjv",
    "bible-kjv-text",
    "r-cran-janeaustenr",
    "dict-foldoc",
    "dict-jargon",
    "fortunes",
)
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion")
COOKIES = (
    "art",
    "computers",
    "definitions",
    "education",
    "humorists",
    "law",
    "linux",
    "miscellaneous",
    "news",
    "platitudes",
    "science",
    "songs-poems",
    "wisdom",
    "work",
)
PASSAGE = 90  # words


def unpacked(work: Path) -> Path:
    """The folder with what the packages hold; downloaded once."""
    root = work / "packages"
    if not (root / "done").exists():
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=root, check=True)
        for package in sorted(root.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, root / "files"], check=True)
        (root / "done").touch()
    return root / "files"


def verses(files: Path, books: str) -> list[tuple[str, str]]:
    """(chapter, verse text) of a range of books such as ``gen1:1-mal4:6``."""
    command = [files / "usr/bin/bible", "-f", "-p", files / "usr/lib"]
    done = subprocess.run([*command, books], capture_output=True, text=True, check=True)
    found = re.findall(r"^(\w+):\d+ (.*)$", done.stdout, re.M)
    if not found:
        raise RuntimeError(f"bible-kjv says nothing of {books}: {done.stdout[:200]}")
    return found


def novels(files: Path) -> dict[str, list[str]]:
    """Paragraphs of each novel, out of R's lazy-load database.

    The index is an RDS of (offset, length) pairs and names; a record is a length, then zlib data: a
    serialised vector of lines, each CHARSXP (type 9) with its own length.
    """
    folder = files / "usr/lib/R/site-library/janeaustenr/data"
    index = gzip.decompress((folder / "Rdata.rdx").read_bytes())
    pairs = re.findall(rb"\0\0\0\x0d\0\0\0\x02(.{4})(.{4})", index, re.S)
    names = re.findall(rb"\0\x04\0\x09.{4}([a-z]+)", index.split(b"names", 1)[1], re.S)
    data = (folder / "Rdata.rdb").read_bytes()
    found = {}
    for name, (offset, length) in zip(names, pairs, strict=False):
        start, size = (struct.unpack(">I", raw)[0] for raw in (offset, length))
        lines = list(_strings(zlib.decompress(data[start + 4 : start + size])))
        paragraphs = "\n".join(lines).split("\n\n")
        found[name.decode()] = [" ".join(p.split()) for p in paragraphs if len(p.split()) > 8]
    return found


def _strings(data: bytes) -> Iterator[str]:
    """The strings of a serialised STRSXP (type 16) of R, big-endian."""
    at = data.index(b"\0\0\0\x10") + 4
    (count,) = struct.unpack_from(">I", data, at)
    at += 4
    for _ in range(count):
        _, length = struct.unpack_from(">Ii", data, at)
        at += 8
        yield data[at : at + max(length, 0)].decode(errors="replace")
        at += max(length, 0)


def dictionary(files: Path, name: str) -> list[str]:
    """The articles of a dictd database, as running text."""
    text = gzip.decompress((files / f"usr/share/dictd/{name}.dict.dz").read_bytes()).decode()
    articles = re.split(r"\n\n(?=\S)", text)
    return [" ".join(article.split()) for article in articles if len(article.split()) > 20]


def cookies(files: Path) -> list[str]:
    """The fortunes of the files of ``COOKIES``."""
    folder, found = files / "usr/share/games/fortunes", []
    for name in COOKIES:
        for text in (folder / name).read_text(errors="replace").split("\n%\n"):
            text = " ".join(text.split())
            if len(text.split()) > 12 and "\ufffd" not in text:
                found.append(text)
    return found


def passages(texts: list[str], words: int = PASSAGE) -> list[str]:
    """Consecutive texts joined until they have so many words."""
    made, held = [], []
    for text in texts:
        held += text.split()
        if len(held) >= words:
            made.append(" ".join(held[: 2 * words]))
            held = []
    return made


def chapters(found: list[tuple[str, str]]) -> list[str]:
    """Passages that do not cross a chapter's border."""
    by_chapter: dict[str, list[str]] = {}
    for chapter, verse in found:
        by_chapter.setdefault(chapter, []).append(verse)
    return [passage for texts in by_chapter.values() for passage in passages(texts)]


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def main(work: Path) -> None:
    files = unpacked(work)
    old = chapters(verses(files, "gen1:1-mal4:6"))
    gospels = chapters(verses(files, "mat1:1-act28:31"))
    letters = chapters(verses(files, "rom1:1-rev22:21"))
    books, quips = novels(files), cookies(files)
    plain = [p for name in NOVELS for p in passages(books[name])]
    articles = dictionary(files, "foldoc") + dictionary(files, "jargon")
    write(work / "general" / "novels.jsonl", [{"text": text} for text in plain])
    write(work / "general" / "articles.jsonl", [{"text": text} for text in articles])
    write(work / "style" / "old_testament.jsonl", [{"text": text} for text in old])
    judges = {"style": gospels, "plain": passages(books["prideprejudice"]) + quips[::2]}
    prompts = {"style": letters, "plain": passages(books["sensesensibility"]) + quips[1::2]}
    for name, texts in (("judges", judges), ("prompts", prompts)):
        for kind in texts:
            random.Random(0).shuffle(texts[kind])
        (work / f"{name}.json").write_text(json.dumps(texts, ensure_ascii=False))
    for name, texts in (
        ("general: novels", plain),
        ("general: articles", articles),
        ("style: Genesis to Malachi", old),
        ("judges, style", judges["style"]),
        ("judges, plain", judges["plain"]),
        ("prompts, style", prompts["style"]),
        ("prompts, plain", prompts["plain"]),
    ):
        words = sum(len(text.split()) for text in texts)
        print(f"{name:<26} {len(texts):>6} passages {words:>9,} words")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
