"""Captioned clips from files, decoded once into buckets of one size each.

A prepared set is a folder ``clips-<key>`` with, for each bucket, ``<T>x<H>x<W>.bin`` (uint8, the
frames of all its clips), ``skipped.jsonl`` (what was left out, with the reason) and ``meta.json``:
every clip's file, first frame, place and captions, and the digest of every ``.bin``. The key covers
names and contents of the files and the options.

Shape suffixes: N clips, T frames, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import xxhash

from step_jax.core import checks
from step_jax.core.errors import ConfigError, DataError
from step_jax.core.files import seal, sealed, write_whole
from step_jax.core.storage import local
from step_jax.core.text import is_utf8, printable
from step_jax.data.config import DataConfig
from step_jax.data.files import Skip, list_skips
from step_jax.data.video_decode import (
    PICTURES,
    VIDEOS,
    fitted,
    frames_per_second,
    is_frames,
    read_frames,
)

_VERSION = 1
_META, _SKIPPED = "meta.json", "skipped.jsonl"
_CHUNK = 2**20
Size = tuple[int, int, int]
Report = Callable[[str], None]


@dataclass(frozen=True)
class ClipFiles:
    """Videos, animations, pictures and folders of numbered pictures, cut into clips.

    path: a folder, in which every file (and every folder in it that holds numbered pictures alone)
      is a clip and ``NAME.txt`` beside it its caption; or JSON lines of ``{"file": ...,
      "caption": "..."}``, where a caption may also be an object of languages (``{"en": ...,
      "zh": ...}``).
    buckets: frames, height and width of the clips. A file goes into the bucket of the nearest
      aspect ratio that is not larger than it, and has the most frames that it can fill.
    every: take one frame in so many.
    captions: whether a clip without one is a bad record.
    max_bad_records: clips that cannot be read before preparation stops with an error.
    cache_dir: where prepared sets are kept; default as of texts.
    """

    kind: ClassVar[str] = "files"
    path: str
    buckets: tuple[Size, ...]
    every: int = 1
    captions: Literal["required", "ignored"] = "required"
    max_bad_records: int = 100
    cache_dir: str | None = None

    def validate(self):
        checks.at_least(self, every=1, max_bad_records=0)
        if not self.buckets or any(n < 1 for size in self.buckets for n in size):
            raise ConfigError(f"buckets {self.buckets} must be (frames, height, width) above 0")
        if len(set(self.buckets)) < len(self.buckets):
            raise ConfigError(f"buckets {self.buckets} name one twice")


class Record(NamedTuple):
    """A file with its captions, by language (``""`` if none is named)."""

    path: Path
    name: str
    captions: dict[str, str]


@dataclass(frozen=True)
class VideoClips:
    """A prepared set, memory-mapped.

    Attributes:
      buckets: those that have clips.
      sizes_N3: frames, height and width of each clip.
      captions: of each clip, in one or several languages; none if they were ignored.
      languages: of each clip's captions.
      files: each clip's file, and its first frame there.
      scalars: ``fps`` of each clip, 0 where it is unknown.
      counters: what was read and left out.
      skipped: the file that names what was left out.
      fingerprint: identifies clips and captions.
    """

    directory: Path
    buckets: tuple[Size, ...]
    sizes_N3: np.ndarray
    captions: list[tuple[str, ...]]
    languages: list[tuple[str, ...]]
    files: list[tuple[str, int]]
    scalars: Mapping[str, np.ndarray]
    counters: dict[str, int]
    skipped: Path
    fingerprint: dict[str, Any]
    _places: list[int]
    _pixels: Mapping[Size, np.ndarray]

    def __len__(self) -> int:
        return len(self.files)

    def of_bucket(self, size: Size) -> np.ndarray:
        """The numbers of a bucket's clips."""
        return np.flatnonzero((self.sizes_N3 == size).all(1))

    def pixels(self, i: int) -> np.ndarray:
        """Clip ``i``: float32 (T, H, W, 3) in [-1, 1]."""
        size: Any = tuple(self.sizes_N3[i].tolist())
        return self._pixels[size][self._places[i]].astype(np.float32) / 127.5 - 1


def prepare_clips(config: ClipFiles, report: Report = lambda message: None) -> VideoClips:
    """The clips of a configuration, decoded if they were not before.

    Raises:
      DataError: no clip, too many bad records, or a damaged cache; names files and reasons.
    """
    records, skips = list_records(config)
    _check_budget(config, skips)
    key = _key(config, records, skips)
    home = DataConfig(cache_dir=config.cache_dir).cache_path
    local(config.cache_dir or home, "cache_dir of clips")
    folder = home / f"clips-{key}"
    if (folder / _META).exists():
        try:
            return open_clips(folder)
        except DataError as error:
            report(f"{error}: the clips are decoded again")
    _write(folder, config, records, skips, report)
    return open_clips(folder)


def list_records(config: ClipFiles) -> tuple[list[Record], list[Skip]]:
    """Files and captions in a fixed order, and the records left out.

    Raises:
      DataError: the path does not exist.
    """
    root = local(config.path, "the clips' path")
    if not root.exists():
        raise DataError(
            f"the clips' path {config.path!r} does not exist: give a folder, or a .jsonl file with "
            "a file and a caption in each line"
        )
    found = _of_folder(root) if root.is_dir() else _of_lines(root)
    records: list[Record] = []
    skips: list[Skip] = []
    for item in found:
        if isinstance(item, Record) and config.captions == "required":
            item = _captioned(item)
        if isinstance(item, Skip):
            skips.append(item)
        else:
            records.append(item)
    return records, skips


def _of_folder(root: Path) -> Iterator[Record | Skip]:
    for path in sorted(root.rglob("*")):
        name = printable(str(path.relative_to(root)))
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        if path.is_dir():
            if not is_frames(path):
                continue
        elif path.suffix.lower() not in VIDEOS | PICTURES:
            continue
        elif path.parent != root and is_frames(path.parent):
            continue
        beside, captions = path.with_suffix(".txt"), {}
        if beside.is_file():
            try:
                captions[""] = beside.read_bytes().decode("utf-8").strip()
            except UnicodeDecodeError as error:
                yield Skip(name, "caption_not_utf8", f"{beside.name}: {error}", bad=True)
                continue
        yield Record(path, name, captions)


def _of_lines(root: Path) -> Iterator[Record | Skip]:
    for number, line in enumerate(root.read_bytes().splitlines(), 1):
        name = f"{root.name}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            path = (root.parent / record["file"]).resolve()
            caption = record.get("caption", {})
        except UnicodeDecodeError as error:
            yield Skip(name, "caption_not_utf8", str(error), bad=True)
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield Skip(name, "bad_record", f"it needs a file: {error!r}", bad=True)
            continue
        captions = {"": caption} if isinstance(caption, str) else caption
        if not isinstance(captions, dict) or not all(isinstance(t, str) for t in captions.values()):
            yield Skip(name, "bad_caption", "neither text nor an object of languages", bad=True)
        elif not path.exists():
            yield Skip(name, "missing_file", str(record["file"]), bad=True)
        else:
            yield Record(path, printable(str(record["file"])), captions)


def _captioned(record: Record) -> Record | Skip:
    captions = {k: text.strip() for k, text in record.captions.items() if text.strip()}
    if not captions:
        return Skip(record.name, "no_caption", "captions are required", bad=True)
    if not all(map(is_utf8, captions.values())):
        return Skip(record.name, "caption_not_utf8", "it holds half a character", bad=True)
    return record._replace(captions=captions)


def _key(config: ClipFiles, records: Sequence[Record], skips: Sequence[Skip]) -> str:
    digest = hashlib.sha256()
    options = [_VERSION, config.buckets, config.every, config.captions, [list(s) for s in skips]]
    digest.update(json.dumps(options).encode())
    for record in records:
        inside = sorted(record.path.iterdir()) if record.path.is_dir() else [record.path]
        content = [_digest(path) for path in inside]
        digest.update(json.dumps([record.name, record.captions, content]).encode())
    return digest.hexdigest()[:32]


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    try:
        with open(path, "rb") as stream:
            while data := stream.read(_CHUNK):
                state.update(data)
    except OSError:
        return "unreadable"  # the reader says so again, by name
    return state.hexdigest()


def _check_budget(config: ClipFiles, skips: Sequence[Skip]) -> None:
    bad = [skip for skip in skips if skip.bad]
    if len(bad) > config.max_bad_records:
        raise DataError(
            f"{config.path}: more than {config.max_bad_records} bad records (max_bad_records). "
            f"{list_skips(bad)}. Repair them, or raise the limit to go on without them"
        )


def clips_of(path: Path, config: ClipFiles) -> list[tuple[Size, int, np.ndarray]]:
    """The clips of a file: (bucket, first frame, uint8 (T, H, W, 3)), one after the other.

    Raises:
      DataError: it cannot be read, or is too short for every bucket.
    """
    made: list[tuple[Size, int, np.ndarray]] = []
    waiting: list[np.ndarray] = []
    buckets: list[Size] = []
    count = 0
    for number, frame_HWC in enumerate(read_frames(path)):
        if number % config.every:
            continue
        buckets = buckets or _nearest(config.buckets, *frame_HWC.shape[:2])
        waiting.append(fitted(frame_HWC, *buckets[0][1:]))
        count += 1
        if len(waiting) == buckets[0][0]:
            made.append((buckets[0], count - len(waiting), np.stack(waiting)))
            waiting = []
    shorter = [size for size in buckets if size[0] <= count]
    if not made and shorter:
        made.append((shorter[0], 0, np.stack(waiting[: shorter[0][0]])))
    if not made:
        least = buckets[-1][0]
        raise DataError(f"has {count} frames; the shortest bucket of its shape has {least}")
    return made


def _nearest(buckets: Sequence[Size], height: int, width: int) -> list[Size]:
    """The buckets for a picture of this size, all of one height and width, the longest first."""

    def off(size: Size) -> float:
        return round(abs(math.log((size[2] / size[1]) / (width / height))), 6)

    alike = [size for size in buckets if off(size) == min(map(off, buckets))]
    small = [size for size in alike if size[1] <= height and size[2] <= width]
    best = max(small, key=lambda s: s[1] * s[2]) if small else min(alike, key=lambda s: s[1] * s[2])
    return sorted((s for s in alike if s[1:] == best[1:]), reverse=True)


def _write(folder: Path, config: ClipFiles, records, skips: list[Skip], report: Report) -> None:
    """Decodes everything into a folder beside, which takes its place when it is whole."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    report(f"decoding {len(records):,} files of {config.path}")
    clips: list[dict[str, Any]] = []
    counts: dict[Size, int] = {}
    for record in records:
        try:
            made = clips_of(record.path, config)
        except DataError as error:
            skips = [*skips, Skip(record.name, "unreadable_clip", str(error), bad=True)]
            _check_budget(config, skips)
            continue
        fps = frames_per_second(record.path)
        for size, first, pixels_THWC in made:
            with open(beside / _file_name(size), "ab") as file:
                file.write(pixels_THWC.tobytes())
            place = counts.get(size, 0)
            counts[size] = place + 1
            clips.append(
                {
                    "file": record.name,
                    "first": first,
                    "size": size,
                    "place": place,
                    "captions": record.captions if config.captions == "required" else {},
                    "fps": 0.0 if fps is None else fps / config.every,
                }  # fmt: skip
            )
    if not clips:
        reasons = list_skips(skips) or "no video or picture in it"
        raise DataError(f"the path {config.path!r} holds no clip: {reasons}")
    digests = {_file_name(size): _digest(beside / _file_name(size)) for size in counts}
    lines = [json.dumps(skip._asdict(), ensure_ascii=False) for skip in skips]
    write_whole(beside / _SKIPPED, "".join(f"{line}\n" for line in lines))
    meta = {"version": _VERSION, "clips": clips, "digests": digests, "skipped": len(skips)}
    seal(beside / _META, meta)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _file_name(size: Size) -> str:
    return "x".join(map(str, size)) + ".bin"


def open_clips(folder: Path) -> VideoClips:
    """A prepared set.

    Raises:
      DataError: a file of it is missing or damaged.
    """
    try:
        meta = sealed(folder / _META)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is damaged ({error})") from None
    for name, digest in meta["digests"].items():
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise DataError(f"{folder / name} is damaged")
    clips = meta["clips"]
    sizes = [tuple(clip["size"]) for clip in clips]
    buckets = tuple(sorted(set(sizes), reverse=True))
    pixels = {
        size: np.memmap(folder / _file_name(size), np.uint8, "r").reshape(-1, *size, 3)
        for size in buckets
    }
    texts = hashlib.sha256(json.dumps([clip["captions"] for clip in clips]).encode()).hexdigest()
    return VideoClips(
        directory=folder,
        buckets=buckets,
        sizes_N3=np.array(sizes),
        captions=[tuple(clip["captions"].values()) for clip in clips],
        languages=[tuple(clip["captions"]) for clip in clips],
        files=[(clip["file"], clip["first"]) for clip in clips],
        scalars={"fps": np.array([clip["fps"] for clip in clips], np.float32)},
        counters={"clips": len(clips), "skipped": meta["skipped"]},
        skipped=folder / _SKIPPED,
        fingerprint={"pixels": meta["digests"], "captions": texts},
        _places=[clip["place"] for clip in clips],
        _pixels=pixels,
    )
