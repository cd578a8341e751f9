"""Randomness without hidden state: every key is a function of what it is for."""

from __future__ import annotations

import zlib

import jax


def fold(seed, step, purpose: str, index=0):
    """The key of ``purpose`` at ``step``: same arguments, same bits, on any mesh.

    Args:
      seed: an integer seed or a key.
      step: an integer or a traced int32 scalar.
      purpose: what the randomness is for, e.g. ``"sample"``.
      index: separates the draws of one purpose and step (a row, a microbatch).
    """
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    key = jax.random.fold_in(key, zlib.crc32(purpose.encode()))
    return jax.random.fold_in(jax.random.fold_in(key, step), index)
