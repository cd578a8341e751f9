"""States of frozen text encoders: of a decoder, of a tower; kept on disk, by their encoder alone.

Shape suffixes: K texts, S tokens of a text, E width of the states.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from step_jax.checkpoint.artifact import Artifact
from step_jax.core.errors import CheckpointError, DataError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.captions import token_rows
from step_jax.inference.text_states import Encoder, cached, encode, encoder_hash, of_prompts
from step_jax.interop.artifacts import InitFrom
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.positions import Alibi
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.text_inputs import States, Tower
from step_jax.tokenizers.sentencepiece import train_sentencepiece
from step_jax.trainers.diffusion import captioned
from tests.models import numpy_oracles, small

TEXTS = ["", "a red square moves left", "红色方块"]
TOKENIZER = train_sentencepiece(["a red square moves left", "红色方块向左移动"] * 9, 310)
ONE = Sharding.build(MeshConfig(), jax.devices()[:1])
#: as Step-LLM: the biases are of the square root of the distance
DECODER = small.decoder(MHA(2, 16, position=Alibi("sqrt")), repeat=1, vocab=TOKENIZER.vocab_size)
TOWER = Tower("clip", 6, TOKENIZER.vocab_size, 8, 1, MHA(2, 4), GELU(16))
DIT = VideoDiT(8, 1, MHA(1, 8, position=None), GELU(8), 1, text=(TOWER,))


def artifact(model, seed: int = 0) -> Artifact:
    params = small.params(model, seed)
    processor = {"tokenizer": TOKENIZER}
    return Artifact("made", Path(), model, params, processor, 16, "float32", 1, {})


@pytest.fixture(scope="module")
def of_decoder():
    return encode(artifact(DECODER), TEXTS, 6, ONE)


def test_states_of_a_decoder_are_those_before_its_final_norm(of_decoder):
    """The one layer as the equations say, in float64: causal, with sqrt-ALiBi, nothing after it."""
    rows = token_rows(TOKENIZER, TEXTS, 6)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), small.params(DECODER))
    layer = jax.tree.map(lambda a: a[0], p.groups[0][0])
    eps = DECODER.norm.eps
    positions = numpy_oracles.Positions(alibi="sqrt")
    for k in range(len(TEXTS)):
        x = p.embedding_VD[rows.values[k, : rows.lengths_K[k]]]

        def normed(x, weight):
            return np.array([numpy_oracles.rms_norm(t, weight, eps) for t in x])

        y, a = normed(x, layer.attention_norm_D), layer.attention
        for n in range(2):
            q, key, value = (y @ w[:, n] for w in (a.query_DNH, a.key_DKH, a.value_DKH))
            bias = positions.bias(n, 2)
            o = numpy_oracles.one_head(list(q), list(key), list(value), 0.25, positions.sees, bias)
            x = x + np.array(o) @ a.output_NHD[n]
        y, m = normed(x, layer.mlp_norm_D), layer.mlp
        gate = y @ m.gate_DF
        x = x + (gate / (1 + np.exp(-gate)) * (y @ m.up_DF)) @ m.down_FD
        got = of_decoder.values[k]
        np.testing.assert_allclose(got[: len(x)], x, rtol=1e-4, atol=1e-4)
        assert (got[len(x) :] == 0).all()


def test_states_are_read_from_disk_once_they_are_made(tmp_path, of_decoder, monkeypatch):
    first = cached(tmp_path / "llm", artifact(DECODER), TEXTS, 6, ONE)
    np.testing.assert_array_equal(first.values, of_decoder.values)
    monkeypatch.setattr("step_jax.inference.text_states.encode", None)  # not called again
    again = cached(tmp_path / "llm", artifact(DECODER), TEXTS, 6, ONE)
    np.testing.assert_array_equal(again.values, first.values)
    np.testing.assert_array_equal(again.lengths_K, first.lengths_K)
    with pytest.raises(DataError, match="are of another encoder .* name another folder"):
        cached(tmp_path / "llm", artifact(DECODER, seed=1), TEXTS, 6, ONE)


@pytest.mark.parametrize("name", ["states.npy", "lengths.npy", "manifest.json"])
def test_damaged_states_are_made_again(tmp_path, of_decoder, monkeypatch, name):
    monkeypatch.setattr("step_jax.inference.text_states.encode", lambda *_: of_decoder)
    said: list[str] = []
    cached(tmp_path, artifact(DECODER), TEXTS, 6, ONE, said.append)
    file = tmp_path / name
    whole = file.read_bytes()
    for damaged in (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], whole[:9], b"", None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        said.clear()
        again = cached(tmp_path, artifact(DECODER), TEXTS, 6, ONE, said.append)
        np.testing.assert_array_equal(again.values, of_decoder.values)
        assert file.read_bytes() == whole
        assert any("made again" in text for text in said) or name == "manifest.json"


def test_other_texts_are_encoded_anew(tmp_path, of_decoder, monkeypatch):
    monkeypatch.setattr("step_jax.inference.text_states.encode", lambda *_: of_decoder)
    said: list[str] = []
    cached(tmp_path, artifact(DECODER), TEXTS, 6, ONE, said.append)
    cached(tmp_path, artifact(DECODER), TEXTS[::-1], 6, ONE, said.append)
    assert len(said) == 1 and "are of other texts: they are made again" in said[0]


def test_an_encoder_is_its_model_its_parameters_and_its_tokenizer():
    mine = encoder_hash(artifact(DECODER))
    assert encoder_hash(artifact(DECODER)) == mine
    other = replace(DECODER, norm=replace(DECODER.norm, eps=1e-6))
    changed = replace(artifact(DECODER), params=small.params(DECODER, 1))
    assert mine not in (encoder_hash(artifact(other)), encoder_hash(changed))


def test_prompts_reach_a_trained_model_as_its_captions_did(of_decoder):
    """A tower is given tokens, an input of states its encoder's, which must be the same one."""
    llm = artifact(DECODER)
    model = replace(DIT, text=(TOWER, States("llm", small.WIDTH, 6)))
    meta = {
        "config": {"text": {"encoders": [{"name": "llm", "artifact": "x", "part": None}]}},
        "data": {"texts": {"made_by": {"clip": TOKENIZER.hash, "llm": encoder_hash(llm)}}},
    }
    trained = replace(artifact(model), meta=meta)
    texts = of_prompts(trained, TEXTS, ONE, lambda *_: llm)
    np.testing.assert_array_equal(texts["llm"].values, of_decoder.values)
    np.testing.assert_array_equal(texts["clip"].values, token_rows(TOKENIZER, TEXTS, 6).values)
    with pytest.raises(CheckpointError, match="was trained with another encoder llm"):
        of_prompts(trained, TEXTS, ONE, lambda *_: artifact(DECODER, seed=1))


def test_a_tower_of_another_model_is_an_encoder_and_a_model_without_one_is_none():
    encoded = encode(artifact(DIT), TEXTS, 6, ONE)
    assert encoded.values.shape == (3, 6, 8)
    assert np.abs(encoded.values[1] - encoded.values[2]).max() > 0.1
    with pytest.raises(CheckpointError, match="with 0 text towers: an encoder of texts is"):
        encode(artifact(replace(DIT, text=())), TEXTS, 6, ONE)


def test_training_on_says_that_the_states_are_of_another_encoder(tmp_path, monkeypatch):
    """Of equal width they fit, and mean something else."""
    llm = artifact(DECODER)
    model = replace(DIT, text=(States("llm", small.WIDTH, 6),))
    trained = replace(
        artifact(model), meta={"data": {"texts": {"made_by": {"llm": encoder_hash(llm)}}}}
    )
    held = {"encoder": llm, "trained": trained, "other": artifact(DECODER, seed=1)}
    monkeypatch.setattr(captioned, "load_artifact", lambda name, *_, **__: held[name])
    monkeypatch.setattr(captioned, "present", lambda name: True)

    def said(encoder: str) -> list[str]:
        text = captioned.Text(encoders=(Encoder("llm", encoder),), cache=tmp_path / encoder)
        config = SimpleNamespace(text=text, init_from=InitFrom("trained"))
        lines: list[str] = []
        captioned.bank_of(config, model, TEXTS, None, ONE, lines.append)
        return [line for line in lines if "another encoder" in line]

    assert said("encoder") == []
    (line,) = said("other")
    assert "was trained with another encoder llm" in line and "learn its states anew" in line
