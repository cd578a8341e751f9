"""Batches of clips: buckets of equal work, packs, captions left out; folders of latents."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from step_jax.core.errors import CheckpointError, ConfigError, DataError
from step_jax.data.captions import Encoded, TextBank, distinct, token_rows
from step_jax.data.clips import ClipDataset, Drawn, Packs, Reads, bucket_rows
from step_jax.data.digits import Digits
from step_jax.data.latents import Clip, LatentFolder, write_latents
from step_jax.data.rendered import RenderedClips
from step_jax.data.scenes import Scenes
from step_jax.data.schema import check
from step_jax.tokenizers.sentencepiece import train_sentencepiece

SIZES = [(1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2), (2, 2, 4), (2, 2, 2), (1, 2, 2)]
READS = Reads((1, 1, 2), ("frames", "fps"), first_frame=True)


@dataclass
class Made:
    """Clips whose numbers are all their own number, 100 more in the first frame."""

    sizes: list = field(default_factory=lambda: SIZES)
    channels: int = 3
    prompts: tuple[str, ...] = ()
    noises_N: Any = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"made": len(self.sizes)}

    @property
    def sizes_N3(self):
        return np.array(self.sizes)

    @property
    def captions(self):
        return [(f"clip {i}", f"片{i}") for i in range(len(self.sizes))]

    @property
    def scalars(self):
        return {"fps": np.arange(len(self.sizes), dtype=np.float32) + 8}

    def latents(self, i):
        clip = np.full((*self.sizes[i], 3), i, np.float32)
        clip[0] += 100
        return clip


def bank(source=None) -> TextBank:
    texts = distinct((source or Made()).captions)
    values = np.arange(len(texts), dtype=np.int32)[:, None] * np.ones(3, np.int32)
    return TextBank(texts, {"clip": Encoded(values, np.full(len(texts), 2, np.int32), "hash")})


def dataset(rows=None, packs=None, dropout=0.0, reads=READS, source=None, seed=0) -> ClipDataset:
    rows = rows or (2 if packs else {(2, 2, 4): 1, (2, 2, 2): 2, (1, 2, 2): 4})
    source = source or Made()
    return ClipDataset(
        source, bank(source), reads, rows=rows, packs=packs, seed=seed, dropout=dropout
    )


def drawn_clips(data: ClipDataset, steps) -> list[list[float]]:
    """Of each step the clips in the order of its rows, read off the patches."""
    return [(b["patches"][:, -1, 0] % 100).tolist() for b in map(data.batch, steps)]


def test_buckets_have_as_many_rows_as_cost_no_more_than_the_costliest():
    flops = {(36, 16, 16): 1717.0, (12, 16, 16): 509.0, (1, 16, 16): 45.0}
    rows = bucket_rows(flops, 8, multiple=4)
    assert rows == {(36, 16, 16): 8, (12, 16, 16): 24, (1, 16, 16): 304}
    costs = [rows[size] * flops[size] for size in flops]
    assert max(costs) == 8 * 1717 and min(costs) > 0.88 * max(costs)
    assert bucket_rows({(1, 1, 1): 1.0}, 1, multiple=4) == {(1, 1, 1): 4}


def test_every_clip_has_its_share_of_batches_of_one_size_each():
    data = dataset()
    steps = range(60)
    shapes = [data.shape_at(step) for step in steps]
    seen = np.zeros(len(SIZES), int)
    for step, shape in zip(steps, shapes, strict=True):
        batch = data.batch(step)
        check(data.schema(shape), batch)
        clips = (batch["patches"][:, -1, 0] % 100).astype(int)
        assert {SIZES[i] for i in clips} == {shape.size}
        seen += np.bincount(clips, minlength=len(SIZES))
    # buckets come by what a batch of theirs holds, so that all clips are seen alike
    assert seen.max() - seen.min() <= 3
    total = sum(shape.rows for shape in shapes)
    assert data.samples_before(60) == total == seen.sum()


def test_samples_are_numbered_in_the_order_in_which_they_come():
    data = dataset()
    numbers = np.concatenate([data.batch(step)["samples"].ravel() for step in range(10)])
    np.testing.assert_array_equal(numbers, np.arange(len(numbers)))


def test_a_batch_holds_a_clip_with_all_that_belongs_to_it():
    data = dataset({(2, 2, 4): 1, (2, 2, 2): 2, (1, 2, 2): 4})
    step = next(s for s in range(9) if data.shape_at(s).size == (2, 2, 4))
    batch = data.batch(step)
    assert batch["patches"].shape == (1, 8, 6) and "segments" not in batch
    assert (batch["patches"][0, :4] == 104).all() and (batch["patches"][0, 4:] == 4).all()
    assert (batch["first"][0, :4] == 104).all() and (batch["first"][0, 4:] == 0).all()
    np.testing.assert_array_equal(batch["places"][0, [1, 2, 7]], [[0, 0, 1], [0, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(batch["scalars"], [[[2.0, 12.0]]])
    names = {data.bank.index[text] for text in Made().captions[4]}
    assert batch["text/clip"][0, 0, 0] in names and batch["lengths/clip"][0, 0] == 2


def test_what_the_model_reads_is_divided_by_its_deviation():
    sizes, reads = {(2, 2, 4): 1, (2, 2, 2): 2, (1, 2, 2): 4}, READS._replace(deviation=4.0)
    data, divided = dataset(sizes), dataset(sizes, reads=reads)
    assert divided.deviation == pytest.approx(data.deviation / 4) and data.deviation > 1
    for step in range(3):
        whole, part = data.batch(step), divided.batch(step)
        for name in whole:
            factor = 4.0 if name in ("patches", "first") else 1
            np.testing.assert_array_equal(whole[name], factor * part[name])


def test_parts_of_a_batch_are_parts_of_the_whole():
    for data in (dataset({(2, 2, 4): 2, (2, 2, 2): 4, (1, 2, 2): 8}), dataset(4, Packs(12, 3))):
        for step in range(4):
            whole, halves = data.batch(step), [data.batch(step, i, 2) for i in range(2)]
            for name, array in whole.items():
                np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), array)


def test_packs_hold_every_clip_once_an_epoch_and_none_is_cut():
    data = dataset(packs=Packs(tokens=12, samples=3))
    seen, numbers = np.zeros(len(SIZES), int), []
    for step in range(12):
        batch = data.batch(step)
        check(data.schema(data.shapes[0]), batch)
        for row, segments in enumerate(batch["segments"]):
            for s in range(1, segments.max() + 1):
                patches = batch["patches"][row][segments == s]
                clip = int(patches[-1, 0] % 100)
                seen[clip] += 1
                assert len(patches) == np.prod(SIZES[clip]) // 2  # the whole clip
                numbers.append(batch["samples"][row, s - 1])
            assert (batch["patches"][row][segments == 0] == 0).all()
    assert seen.max() - seen.min() <= 1 and seen.min() > 3
    np.testing.assert_array_equal(numbers, np.arange(len(numbers)))


def test_captions_are_left_out_at_the_rate_that_was_asked_for():
    data = dataset(dropout=0.1)
    numbers = np.arange(200_000)
    texts = data.text_of(Drawn(numbers % len(SIZES), numbers, numbers))
    assert (texts == 0).mean() == pytest.approx(0.1, rel=0.01)
    chinese = np.isin(texts, [data.bank.index[zh] for _, zh in Made().captions])
    assert chinese.sum() / (texts > 0).sum() == pytest.approx(0.5, rel=0.01)
    assert (dataset().text_of(Drawn(numbers % 7, numbers, numbers)) > 0).all()


def test_batches_depend_on_the_seed():
    one, other = (drawn_clips(dataset(seed=s), range(8)) for s in (0, 1))
    assert one == drawn_clips(dataset(seed=0), range(8)) != other


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="reads motion of a clip, which the data do not tell .*fps"):
        dataset(reads=Reads((1, 1, 1), ("motion",)))
    with pytest.raises(ConfigError, match="packs.tokens is 7; the largest clip has 8"):
        dataset(packs=Packs(7, 2))
    with pytest.raises(ConfigError, match=r"the buckets \[\(9, 9, 9\)\] have no clip"):
        dataset({(9, 9, 9): 1})
    data = dataset()
    data.check(data.fingerprint, 3)
    with pytest.raises(CheckpointError, match="step 3 was made with other data: made differ"):
        data.check({**data.fingerprint, "made": 8}, 3)


# --- captions ------------------------------------------------------------------------------------


def test_captions_are_text():
    assert distinct([("a", "b"), ("b",)]) == ["", "a", "b"]
    with pytest.raises(DataError, match="clip 1 has no caption"):
        distinct([("a",), ()])
    with pytest.raises(DataError, match="clip 0 has no caption, or an empty one"):
        distinct([("a", " ")])
    with pytest.raises(DataError, match=r"caption of clip 0 is not UTF-8: 'caf\\\\xe9'"):
        distinct([("caf\udce9",)])


def test_what_a_token_limit_cuts_off_is_told():
    tokenizer = train_sentencepiece(["a red square moves left", "红色方块"] * 9, 300)
    said: list[str] = []
    whole = token_rows(tokenizer, ["a red square", ""], 40, said.append)
    assert said == [] and whole.lengths_K[1] == 1  # no text is the token before a document
    assert tokenizer.decode([int(t) for t in whole.values[0, 1 : whole.lengths_K[0]]]) == (
        "a red square"
    )
    cut = token_rows(tokenizer, ["a red square", "a"], whole.lengths_K[0] - 1, said.append)
    np.testing.assert_array_equal(cut.values[0], whole.values[0, : whole.lengths_K[0] - 1])
    assert "1 of 2 texts have more than" in said[0] and "loses" in said[0]


# --- folders of latents --------------------------------------------------------------------------


def test_a_folder_of_latents_gives_back_what_was_written(tmp_path):
    made = Made()
    clips = [
        Clip(made.latents(i), made.captions[i], {"fps": made.scalars["fps"][i].item()})
        for i in range(len(SIZES))
    ]
    write_latents(tmp_path, clips, made_by="vae")
    folder = LatentFolder.open(tmp_path, "vae")
    np.testing.assert_array_equal(folder.sizes_N3, SIZES)
    assert folder.captions == made.captions and folder.channels == 3
    np.testing.assert_array_equal(folder.scalars["fps"], made.scalars["fps"])
    for i in range(len(SIZES)):
        np.testing.assert_array_equal(folder.latents(i), made.latents(i))
    with pytest.raises(DataError, match=r"of another autoencoder \(vae\) than the one given"):
        LatentFolder.open(tmp_path, "other")
    assert not list(tmp_path.glob(".*"))  # nothing is left beside
    file = tmp_path / "2_2_4.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"damaged files \['2_2_4.npy'\]"):
        LatentFolder.open(tmp_path)
    with pytest.raises(DataError, match="is no folder of latents"):
        LatentFolder.open(tmp_path / "nowhere")


def test_a_caption_that_is_not_what_was_written_is_refused(tmp_path):
    write_latents(tmp_path, [Clip(Made().latents(0), ("a red box",), {})], made_by="vae")
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("a red box", "a bed box"))
    with pytest.raises(DataError, match="is no folder of latents: .* is not what was written"):
        LatentFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("second", "scalars", "message"),
    [((1, 2, 2, 4), {}, "clip 1 has other channels"), ((1, 2, 2, 3), {"fps": 1.0}, "or scalars")],
)
def test_clips_that_do_not_go_together_are_refused(tmp_path, second, scalars, message):
    clips = [Clip(np.zeros((1, 2, 2, 3)), ("a",)), Clip(np.zeros(second), ("b",), scalars)]
    with pytest.raises(DataError, match=message):
        write_latents(tmp_path, clips, "")
    with pytest.raises(DataError, match="no clip to write"):
        write_latents(tmp_path, [], "")
    assert not list(tmp_path.iterdir())


def test_clips_are_written_one_at_a_time(tmp_path):
    """Of 64 clips of a megabyte, each gone before the one after the next is made."""
    alive = []

    def made():
        for i in range(64):
            latents = np.full((1, 256, 256, 4), i, np.float32)
            alive.append(weakref.ref(latents))
            yield Clip(latents, (str(i),))
            del latents
            assert sum(ref() is not None for ref in alive) <= 1

    write_latents(tmp_path, made(), "")
    folder = LatentFolder.open(tmp_path)
    assert [folder.latents(i)[0, 0, 0, 0] for i in range(64)] == list(range(64))


@pytest.mark.thorough
def test_digits_are_pictures_of_one_frame_with_captions_in_two_languages():
    pytest.importorskip("sklearn")
    digits = Digits.load()
    assert digits.latents(0).shape == tuple(digits.sizes_N3[0]) + (1,)
    assert digits.images_NFHWC.min() == -1 and digits.images_NFHWC.max() == 1
    seven = int(np.flatnonzero(digits.digits_N == 7)[0])
    assert digits.captions[seven] == ("the digit seven", "数字七")
    assert len(digits.prompts) == 20 and set(digits.prompts) == {
        text for texts in digits.captions for text in texts
    }


def test_rendered_scenes_are_clips_with_captions_and_prompts_of_their_own():
    families = (
        Scenes(frames=8, height=16, width=12, count=1, camera=False),
        Scenes(frames=1, height=12, width=12, count=1),
    )
    source = RenderedClips(families, 9, seed=3)
    assert [tuple(size) for size in source.sizes_N3[:3]] == [(8, 16, 12), (1, 12, 12), (8, 16, 12)]
    assert source.latents(2).shape == (8, 16, 12, 3)
    np.testing.assert_array_equal(source.latents(2), RenderedClips(families, 99, 3).latents(2))
    scene = families[0].draw(3, 2)
    assert source.captions[2] == (scene.caption("en"), scene.caption("zh"))
    assert all(source.asked_for[p].caption("en") for p in source.prompts)
    english = [p for p in source.prompts if p.isascii()]
    assert 0 < len(english) < len(source.prompts)
