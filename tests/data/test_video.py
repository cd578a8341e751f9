"""Clips from files and of scenes: decoding, buckets, captions, quarantine, order."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from step_jax.core.errors import CheckpointError, ConfigError, DataError
from step_jax.data.scenes import Scenes
from step_jax.data.video import ClipBatches, Filed, Rendered, SceneClips, open_source, rows_of
from step_jax.data.video_decode import fitted, is_frames, read_frames
from step_jax.data.video_files import ClipFiles, clips_of, open_clips, prepare_clips

BUCKETS = ((5, 16, 24), (5, 24, 16), (1, 16, 24))
RED, BLUE = (220, 30, 30), (30, 30, 220)


def picture(path, colour=RED, size=(48, 32), **save):
    Image.new("RGB", size, colour).save(path, **save)


def animation(path, count: int, size=(48, 32)):
    frames = [Image.new("RGB", size, (20 * i, 0, 255 - 20 * i)) for i in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def video(path, count: int, size=(48, 32), rate: int = 12):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(count):
            frame = np.full((size[1], size[0], 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def config(folder, **options) -> ClipFiles:
    options = {"buckets": BUCKETS, "captions": "ignored", "max_bad_records": 0} | options
    return ClipFiles(path=str(folder), cache_dir=str(folder.parent / "cache"), **options)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "clips"
    path.mkdir()
    return path


# --- decoding ---------------------------------------------------------------------------------


def test_a_video_is_read_frame_by_frame(folder):
    video(folder / "a.mp4", 7)
    frames = list(read_frames(folder / "a.mp4"))
    assert len(frames) == 7 and frames[0].shape == (32, 48, 3)
    np.testing.assert_allclose([f.mean() for f in frames], np.arange(7) * 20, atol=3)


def test_animations_pictures_and_numbered_folders_are_read(folder):
    animation(folder / "a.gif", 4)
    animation(folder / "b.webp", 4)
    (folder / "c").mkdir()
    for i in (2, 10, 1):
        picture(folder / "c" / f"{i}.png", (i, i, i))
    assert [len(list(read_frames(folder / n))) for n in ("a.gif", "b.webp", "c")] == [4, 4, 3]
    assert [int(f[0, 0, 0]) for f in read_frames(folder / "c")] == [1, 2, 10]
    assert is_frames(folder / "c") and not is_frames(folder)


def test_what_is_transparent_is_white(folder):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(folder / "a.png")
    assert next(read_frames(folder / "a.png")).min() == 255


def test_a_frame_covers_its_size_and_keeps_its_shape():
    frame = np.zeros((40, 100, 3), np.uint8)
    frame[:, 40:60] = 255
    out = fitted(frame, 20, 20)
    assert out.shape == (20, 20, 3)
    np.testing.assert_allclose(np.flatnonzero(out[10, :, 0] > 127)[[0, -1]], [5, 14], atol=0)
    np.testing.assert_array_equal(fitted(frame, 40, 100), frame)


# --- buckets ----------------------------------------------------------------------------------


def test_a_file_goes_to_the_nearest_shape_and_is_cut_into_clips(folder):
    animation(folder / "wide.gif", 11)
    animation(folder / "high.gif", 5, size=(32, 48))
    picture(folder / "still.png")
    wide = clips_of(folder / "wide.gif", config(folder))
    assert [(size, first) for size, first, _ in wide] == [((5, 16, 24), 0), ((5, 16, 24), 5)]
    assert wide[0][2].shape == (5, 16, 24, 3)
    assert [size for size, _, _ in clips_of(folder / "high.gif", config(folder))] == [(5, 24, 16)]
    assert [size for size, _, _ in clips_of(folder / "still.png", config(folder))] == [(1, 16, 24)]
    sparse = clips_of(folder / "wide.gif", config(folder, every=2))
    assert [first for _, first, _ in sparse] == [0]
    np.testing.assert_array_equal(sparse[0][2][1], wide[0][2][2])


def test_of_two_sizes_the_largest_that_is_not_above_the_file_is_taken(folder):
    picture(folder / "a.png", size=(48, 32))
    sizes = ((1, 16, 24), (1, 32, 48), (1, 64, 96))
    assert clips_of(folder / "a.png", config(folder, buckets=sizes))[0][0] == (1, 32, 48)
    assert clips_of(folder / "a.png", config(folder, buckets=sizes[2:]))[0][0] == (1, 64, 96)


def test_what_is_too_short_for_every_bucket_is_said(folder):
    picture(folder / "high.png", size=(32, 48))
    with pytest.raises(DataError, match="has 1 frames; the shortest bucket of its shape has 5"):
        clips_of(folder / "high.png", config(folder))


# --- sets -------------------------------------------------------------------------------------


def test_a_set_is_decoded_once_and_checked_when_it_is_opened(folder):
    animation(folder / "a.gif", 10)
    picture(folder / "b.png")
    said: list[str] = []
    clips = prepare_clips(config(folder), said.append)
    again = prepare_clips(config(folder), said.append)
    assert said == [f"decoding 2 files of {folder}"]
    assert clips.fingerprint == again.fingerprint and len(clips) == 3
    assert clips.files == [("a.gif", 0), ("a.gif", 5), ("b.png", 0)]
    first = clips.pixels(0)
    assert first.shape == (5, 16, 24, 3) and first.dtype == np.float32
    np.testing.assert_allclose(clips.pixels(2)[0, 0, 0], np.array(RED) / 127.5 - 1, atol=0.02)
    picture(folder / "b.png", BLUE)
    other = prepare_clips(config(folder))
    assert other.fingerprint["pixels"] != clips.fingerprint["pixels"]


def test_a_damaged_set_is_decoded_again(folder):
    picture(folder / "b.png")
    clips = prepare_clips(config(folder))
    for name in ("1x16x24.bin", "meta.json"):
        file = clips.directory / name
        whole = file.read_bytes()
        for damaged in (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], whole[:9], b""):
            file.write_bytes(damaged)
            with pytest.raises(DataError, match="is damaged"):
                open_clips(clips.directory)
            said: list[str] = []
            again = prepare_clips(config(folder), said.append)
            assert again.fingerprint == clips.fingerprint and file.read_bytes() == whole
            assert "decoded again" in said[0]


BAD = {
    "half.mp4": b"\0\0\0\x18ftypisom" + b"\0" * 64,
    "empty.mp4": b"",
    "none.gif": b"GIF89a",
    "torn.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 20,
}


def test_broken_files_are_left_out_by_name_within_a_budget(folder):
    pytest.importorskip("av")
    picture(folder / "good.png")
    for name, content in BAD.items():
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=r"more than 3 bad records .*empty\.mp4: unreadable_clip"):
        prepare_clips(config(folder, max_bad_records=3))
    clips = prepare_clips(config(folder, max_bad_records=4))
    assert [name for name, _ in clips.files] == ["good.png"]
    lines = [json.loads(line) for line in clips.skipped.read_text().splitlines()]
    assert {line["name"] for line in lines} == set(BAD)


def test_a_torn_video_is_left_out_as_a_whole(folder):
    video(folder / "a.mp4", 12, size=(64, 64))
    whole = (folder / "a.mp4").read_bytes()
    (folder / "a.mp4").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError, match="a.mp4: unreadable_clip"):
        prepare_clips(config(folder))


def test_a_folder_without_clips_says_what_it_found(folder):
    (folder / "a.txt").write_text("no clip")
    with pytest.raises(DataError, match="no video or picture in it"):
        prepare_clips(config(folder))
    with pytest.raises(DataError, match="does not exist"):
        prepare_clips(config(folder / "nowhere"))


# --- captions ---------------------------------------------------------------------------------


def test_captions_come_from_a_file_beside_or_from_json_lines_in_several_languages(folder):
    picture(folder / "a.png")
    (folder / "a.txt").write_text("一个红色的圆形。\n", encoding="utf-8")
    assert prepare_clips(config(folder, captions="required")).captions == [("一个红色的圆形。",)]
    lines = folder.parent / "list.jsonl"
    record = {"file": "clips/a.png", "caption": {"en": "A red circle.", "zh": "圆形"}}
    lines.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    clips = prepare_clips(config(lines, captions="required"))
    assert clips.captions == [("A red circle.", "圆形")] and clips.languages == [("en", "zh")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"file": "clips/a.png"}', "no_caption"),
        (b'{"file": "clips/a.png", "caption": "  "}', "no_caption"),
        (b'{"file": "clips/a.png", "caption": ["x"]}', "bad_caption"),
        (b'{"file": "clips/b.png", "caption": "x"}', "missing_file"),
        (b'{"caption": "x"}', "bad_record"),
        (b"not json", "bad_record"),
        (b'{"file": "clips/a.png", "caption": "\xff\xfe"}', "caption_not_utf8"),
        (b'{"file": "clips/a.png", "caption": "\\ud83d"}', "caption_not_utf8"),
    ],
)
def test_a_caption_that_cannot_be_used_is_a_bad_record(folder, line, reason):
    picture(folder / "a.png")
    lines = folder.parent / "list.jsonl"
    lines.write_bytes(line + b"\n")
    with pytest.raises(DataError, match=reason):
        prepare_clips(config(lines, captions="required"))


def test_a_caption_file_in_another_encoding_is_a_bad_record(folder):
    picture(folder / "a.png")
    (folder / "a.txt").write_bytes("圆形".encode("gbk"))
    with pytest.raises(DataError, match="a.txt: .*utf-8"):
        prepare_clips(config(folder, captions="required"))


# --- batches ----------------------------------------------------------------------------------

SCENES = SceneClips((Scenes(5, 16, 16), Scenes(1, 16, 16)))


def test_rows_have_the_same_number_of_pixels_in_all_buckets():
    assert rows_of(((17, 64, 64), (1, 64, 64), (17, 32, 64)), 2, 2) == {
        (17, 64, 64): 2,
        (1, 64, 64): 34,
        (17, 32, 64): 4,
    }


def test_batches_are_a_function_of_the_step_for_every_number_of_processes():
    batches = ClipBatches(Rendered(SCENES, 0), {(5, 16, 16): 2, (1, 16, 16): 4}, seed=0)
    sizes = [batches.size_at(step) for step in range(4)]
    assert set(sizes) == set(SCENES.buckets)
    for step in (0, 1, 3):
        whole = batches.batch(step)["video"]
        assert whole.shape == (batches.rows[sizes[step]], *sizes[step], 3)
        parts = [batches.batch(step, i, 2)["video"] for i in range(2)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    seen = [batches.batch(step)["video"] for step in range(4) if sizes[step][0] == 1]
    assert np.any(seen[0] != seen[1])


def test_every_clip_of_a_set_is_read_once_an_epoch_in_an_order_of_the_seed(folder):
    for i in range(6):
        picture(folder / f"{i}.png", (40 * i, 0, 0))
    source = open_source(config(folder), seed=0)
    orders = []
    for seed in (0, 1):
        batches = ClipBatches(source, {(1, 16, 24): 3}, seed)
        rows = np.concatenate([batches.batch(step)["video"] for step in range(4)])
        orders.append(rows[:, 0, 0, 0, 0].tolist())
        assert sorted(orders[-1][:6]) == sorted(orders[-1][6:]) and len(set(orders[-1])) == 6
    assert orders[0] != orders[1] and orders[0][:6] != orders[0][6:]


def test_a_run_of_other_clips_is_not_gone_on_with():
    a = ClipBatches(Rendered(SCENES, 0), {(5, 16, 16): 2}, seed=0)
    b = ClipBatches(Rendered(SCENES, 0), {(5, 16, 16): 4}, seed=0)
    a.check(a.fingerprint, 3)
    with pytest.raises(CheckpointError, match="step 3 was made with other clips: rows differ"):
        b.check(a.fingerprint, 3)


def test_a_bucket_without_clips_is_refused(folder):
    picture(folder / "a.png")
    with pytest.raises(DataError, match="no clip is of the buckets"):
        ClipBatches(Filed(prepare_clips(config(folder))), {(5, 16, 24): 1}, seed=0)


@pytest.mark.parametrize(
    "broken", [ClipFiles("x", ()), ClipFiles("x", ((0, 1, 1),)), SceneClips((Scenes(), Scenes()))]
)
def test_impossible_buckets_are_refused(broken):
    with pytest.raises(ConfigError):
        broken.validate()
