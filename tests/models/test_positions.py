from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_jax.core.errors import ConfigError
from step_jax.models.layers.attention import MFA, MHA, MLA
from step_jax.models.layers.positions import (
    Alibi,
    LinearScaling,
    Rope,
    RopeScaling,
    Yarn,
    alibi,
    rotate,
    rotate_queries,
)
from step_jax.ops.attention import alibi_slopes_N

RNG = np.random.default_rng(0)
Q, K = RNG.standard_normal((2, 1, 1, 1, 16)).astype(np.float32)


def rotated(rope, x, position):
    place = np.full((1, 1, 1), position, np.int32)
    return np.asarray(rope.apply(jnp.asarray(x), place), np.float64)


@settings(max_examples=20)
@given(st.integers(0, 4000), st.integers(0, 4000), st.sampled_from([0.5, 1.0]))
def test_rope_keeps_norms_and_sees_only_the_distance(i, j, fraction):
    rope = Rope(fraction=fraction)
    q, k = rotated(rope, Q, i), rotated(rope, K, j)
    assert np.linalg.norm(q) == pytest.approx(np.linalg.norm(Q), rel=1e-5)
    near, far = min(i, j), max(i, j)
    q0, k0 = rotated(rope, Q, i - near), rotated(rope, K, j - near)
    assert np.sum(q * k) == pytest.approx(np.sum(q0 * k0), abs=5e-3), far
    width = int(16 * fraction)
    np.testing.assert_array_equal(q[..., width:], Q[..., width:])


@pytest.mark.parametrize("position", [0, 1, 7, 4096, 65_536])
def test_rope_is_a_rotation_of_coordinates_half_a_width_apart(position):
    rope = Rope(theta=500.0)
    got = rotated(rope, Q, position)[0, 0, 0]
    x = Q.astype(np.float64)[0, 0, 0]
    z = (x[:8] + 1j * x[8:]) * np.exp(1j * position * 500.0 ** (-np.arange(8) / 8))
    # angles are float32: at 2^16 their last bit is 2^-8 of a radian, in fast coordinates less
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag]), atol=1e-6 + 1e-6 * position)


def test_rope_returns_the_dtype_it_was_given_and_angles_do_not_lose_positions():
    """In bfloat16 position 257 would be 256."""
    x = jnp.asarray(Q, jnp.bfloat16)
    rope = Rope(theta=1e6)
    y = rope.apply(x, np.full((1, 1, 1), 257, np.int32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float64), rotated(rope, np.asarray(x, np.float32), 257), atol=0.02
    )
    assert not np.array_equal(y, rope.apply(x, np.full((1, 1, 1), 256, np.int32)))


def test_rope_scaling_slows_down_what_turns_seldom():
    """Wavelengths 10, 500 and 100000 at a context of 1000: kept, half way, eight times slower."""
    scaling = RopeScaling(factor=8.0, length=1000, low=1.0, high=3.0)
    wavelength = np.array([10.0, 500.0, 1e5])
    scaled = scaling.apply(jnp.asarray(2 * np.pi / wavelength, jnp.float32), 1e5)
    between = (0.5 + 0.5 / 8) / 500
    np.testing.assert_allclose(scaled / (2 * np.pi), [1 / 10, between, 1 / 8e5], rtol=1e-6)
    slow, plain = Rope(theta=1e5, scaling=scaling), Rope(theta=1e5)
    assert not np.allclose(rotated(slow, Q, 100), rotated(plain, Q, 100))
    np.testing.assert_array_equal(rotated(slow, Q, 100)[..., 0], rotated(plain, Q, 100)[..., 0])


@pytest.mark.thorough
@pytest.mark.parametrize("axes,theta", [((8, 8), 100.0), ((64, 32, 32), 1e4), ((6, 4, 2), 1e4)])
def test_places_of_several_axes_rotate_a_piece_of_the_head_each(axes, theta):
    """Step-Video's convention in complex numbers: in piece a, of width w, coordinates i and
    i + w/2 turn by place_a * theta^(-2i/w); what is left over does not turn."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 5, 3, sum(axes) + 2)).astype(np.float32)
    place = rng.integers(0, 60, (2, 5, len(axes))).astype(np.int32)
    expected, start = x.astype(np.float64), 0
    for a, width in enumerate(axes):
        half = width // 2
        turn = place[..., a, None, None] * theta ** (-2 * np.arange(half) / width)
        first, second = slice(start, start + half), slice(start + half, start + width)
        z = (x[..., first] + 1j * x[..., second].astype(np.float64)) * np.exp(1j * turn)
        expected[..., first], expected[..., second] = z.real, z.imag
        start += width
    got = Rope(theta=theta, axes=axes).apply(jnp.asarray(x), place)
    np.testing.assert_allclose(got, expected, atol=3e-5)  # float32 angles of up to 60 radians


@pytest.mark.parametrize("axes,found", [((), 3), ((8, 8), 3), ((8, 8), 1)])
def test_places_with_other_axes_than_the_rope_are_refused(axes, found):
    place = np.zeros((1, 1, found), np.int32)
    message = rf"places of {found} coordinate\(s\), and rope rotates by {len(axes) or 1} "
    with pytest.raises(ConfigError, match=message):
        Rope(axes=axes).apply(jnp.asarray(Q), place)


def test_yarn_slows_down_what_turns_seldom_and_raises_scores():
    """2309.00071, 3.2 and 3.4: of 8 rotations, those of 6.4 to 0.4 turns at a context of 64."""
    yarn = Yarn(factor=4.0, length=64, fast=4.0, slow=0.5, truncate=False)
    rope, plain = Rope(theta=256.0, scaling=yarn), Rope(theta=256.0)
    turns = 64 * 256.0 ** (-np.arange(8) / 8) / (2 * np.pi)
    number = lambda t: 8 * np.log(64 / (2 * np.pi * t)) / np.log(256.0)  # noqa: E731
    slowed = np.clip((np.arange(8) - number(4.0)) / (number(0.5) - number(4.0)), 0, 1)
    expected = turns * (1 - slowed + slowed / 4.0) * 2 * np.pi / 64
    np.testing.assert_allclose(rope.frequencies_F(16), expected, rtol=1e-5)
    assert slowed[0] == 0.0 and 0.0 < slowed[3] < 1.0 and slowed[-1] == 1.0
    # queries carry the factor of queries and of keys, and keys none
    factor = 1 + 0.1 * np.log(4.0)
    at = np.full((1, 1, 1), 5, np.int32)
    np.testing.assert_allclose(
        rotate_queries(rope, jnp.asarray(Q), at), factor**2 * rotated(rope, Q, 5), rtol=1e-5
    )
    np.testing.assert_array_equal(
        rotate_queries(plain, jnp.asarray(Q), at), rotate(plain, jnp.asarray(Q), at)
    )
    assert yarn.score_factor == 1.0
    assert Yarn(4.0, 64, mscale=1.0, mscale_all_dim=1.0).magnitude == 1.0
    assert Yarn(4.0, 64, mscale_all_dim=1.0).score_factor == pytest.approx(factor**2)
    np.testing.assert_allclose(
        Rope(scaling=LinearScaling(3.0)).frequencies_F(16), Rope().frequencies_F(16) / 3, rtol=1e-6
    )


def test_published_alibi_slopes():
    """2108.12409, section 3: 8 heads 1/2 .. 1/256; 12 heads: those and the odd ones of 16."""
    eight = [2.0**-n for n in range(1, 9)]
    np.testing.assert_allclose(alibi_slopes_N(8), eight)
    between = [2.0 ** (-(2 * n + 1) / 2) for n in range(4)]
    np.testing.assert_allclose(alibi_slopes_N(12), eight + between, rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes_N(1), [2.0**-8])


def test_each_position_takes_its_own_way():
    x = jnp.asarray(Q)
    at = np.full((1, 1, 1), 3, np.int32)
    for position in (None, Alibi(), Alibi("sqrt")):
        assert rotate(position, x, at) is x
    assert [alibi(p) for p in (None, Rope(), Alibi(), Alibi("sqrt"))] == [
        None,
        None,
        "linear",
        "sqrt",
    ]


@pytest.mark.parametrize(
    "bad,message",
    [
        (Rope(fraction=0.0), r"fraction is 0.0; it must be in \(0, 1\]"),
        (Rope(fraction=1.5), "fraction is 1.5"),
        (Rope(theta=1.0), "theta is 1.0; it must be above 1"),
        (Rope(axes=(8,)), r"rope axes are \[8\]; they must be two or more even widths"),
        (Rope(axes=(8, 3)), r"rope axes are \[8, 3\]; they must be two or more even widths"),
        (Rope(axes=(8, 0)), r"rope axes are \[8, 0\]"),
        (Rope(axes=(8, 8), fraction=0.5), "leave fraction at 1"),
        (MHA(2, 8, position=Rope(axes=(6, 4))), r"axes \[6, 4\] take 10 .* of a head of 8"),
        (MFA(2, 8, position=Rope(axes=(6, 4))), r"axes \[6, 4\] take 10 .* of a head of 8"),
        (MLA(2, 8, 8, 4, 8, position=Rope(axes=(4, 2))), r"take 6 coordinates of a head of 4"),
        (RopeScaling(0.5, 8), "needs a factor and a length of at least 1, not 0.5 and 8"),
        (LinearScaling(0.5), "needs a factor and a length of at least 1, not 0.5"),
        (Yarn(0.5, 8), "needs a factor and a length of at least 1, not 0.5 and 8"),
        (Yarn(2.0, 8, fast=1.0), "yarn needs 0 < slow < fast, not 1.0 and 1.0"),
        (Yarn(2.0, 8, attention_factor=0.0), "a positive attention_factor: 0.0"),
        (RopeScaling(2.0, 8, low=4.0), "needs 0 < low < high, not 4.0 and 4.0"),
    ],
)
def test_bad_ropes_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        bad.validate()
    with pytest.raises(ConfigError, match="rotates 5 of 10 coordinates, an odd number"):
        Rope(fraction=0.5).rotated_width(10)
