"""What the decode kernels of all platforms take, in words and in checks.

Attention of new tokens over a cache that already holds them. Shape suffixes: B rows (sequences), T
new tokens of a row, N query heads, K key/value heads, G = N / K, H head width, S slots of a row, L
pages of a pool, M pages of a row, F = H / 2 frequencies.

``decode(q_BTNH, k_cache, v_cache, positions_BT, lengths_B, *, ...)``:

  q_BTNH: rotated to their positions.
  k_cache, v_cache: (B, S, K, H), or (L, page, K, H) with a page table. Position p of a row lies in
    slot ``p % S`` (``S = M * page`` if paged). What was never written must be finite. ``v_cache``
    None: values are the keys as cached.
  positions_BT: int32 positions of the queries; a negative one sees nothing.
  lengths_B: int32 tokens stored, those of this call included.
  scale: multiplies the scores.
  window: a query sees itself and the ``window - 1`` positions before it; None for all.
  frequency_F: float32; keys are cached unrotated and coordinate pairs ``(i, i + H/2)`` are rotated
    by ``position * frequency_F[i]`` after reading. None: keys are used as cached.
  k_scale, v_scale: float32 scalar or (K,): what cached numbers are multiplied by, None for 1.
  page_table_BM: int32 page of every M-th part of a row's slots; entries behind a row's last token
    are not read.
  layer: int32 scalar; the caches then have a leading axis of layers, of which one is read where it
    lies.
  first_head, heads_per_key: if the caller holds a slice of the query heads but all key heads: the
    number of its first head (may be traced) and G.

The result is (B, T, N, H) in the dtype of the queries, zeros where a query sees nothing. Scores,
softmax and sums are float32.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Support:
    """Of one kernel: its name in messages, and the dtypes it takes."""

    kernel: str
    query_dtypes: tuple[str, ...]
    cache_dtypes: tuple[str, ...]

    def check_arrays(self, q_BTNH, k_cache, v_cache, frequency_F, heads_per_key: int | None):
        """Raises ValueError for arrays that no decode kernel, or not this one, takes."""
        if q_BTNH.ndim != 4 or k_cache.ndim not in (4, 5):
            raise ValueError(
                "expected queries (B, T, N, H) and caches (B, S, K, H), pages (L, page, K, H) or "
                f"stacks of either, got {q_BTNH.shape} and {k_cache.shape}"
            )
        if 0 in q_BTNH.shape or 0 in k_cache.shape:
            raise ValueError(f"nothing to decode: {q_BTNH.shape} queries, {k_cache.shape} cache")
        N, H = q_BTNH.shape[2:]
        K = k_cache.shape[-2]
        if k_cache.shape[-1] != H or (v_cache is not None and v_cache.shape != k_cache.shape):
            raise ValueError(
                f"queries of width {H}, keys {k_cache.shape}, values "
                f"{None if v_cache is None else v_cache.shape}; the {self.kernel} supports one "
                "width for all and caches of one shape"
            )
        if heads_per_key is not None and heads_per_key < 1:
            raise ValueError(f"heads_per_key must be at least 1, got {heads_per_key}")
        if heads_per_key is None and N % K:
            raise ValueError(f"{N} query heads are not a multiple of {K} key/value heads")
        if q_BTNH.dtype.name not in self.query_dtypes:
            raise ValueError(
                f"queries are {q_BTNH.dtype.name}; the {self.kernel} supports "
                + ", ".join(self.query_dtypes)
            )
        if k_cache.dtype.name not in self.cache_dtypes:
            raise ValueError(
                f"the cache is {k_cache.dtype.name}; the {self.kernel} supports "
                + ", ".join(self.cache_dtypes)
            )
        if v_cache is not None and v_cache.dtype != k_cache.dtype:
            raise ValueError(
                f"keys are {k_cache.dtype} and values {v_cache.dtype}, which must agree"
            )
        if frequency_F is not None and frequency_F.shape != (H // 2,):
            raise ValueError(
                f"{frequency_F.shape} frequencies for width {H}; the {self.kernel} rotates keys "
                f"over their whole width, which takes ({H // 2},)"
            )


def check_call(
    q_BTNH, k_cache, positions_BT, lengths_B, *, window, page_table_BM, layer, splits: int | None
) -> None:
    """Raises ValueError for arguments that do not fit each other."""
    B, T = q_BTNH.shape[:2]
    if positions_BT.shape != (B, T) or lengths_B.shape != (B,):
        raise ValueError(
            f"{B} rows of {T} queries take positions {(B, T)} and lengths {(B,)}, got "
            f"{positions_BT.shape} and {lengths_B.shape}"
        )
    integers = [positions_BT, lengths_B, *([] if page_table_BM is None else [page_table_BM])]
    if any(x.dtype != jnp.int32 for x in integers):
        found = ", ".join(str(x.dtype) for x in integers)
        raise ValueError(f"positions, lengths and page tables are int32, got {found}")
    if k_cache.ndim != (4 if layer is None else 5):
        given = "without `layer`" if layer is None else "with `layer`"
        raise ValueError(
            f"a cache {given} has {4 if layer is None else 5} axes, got {k_cache.shape}"
        )
    if page_table_BM is None:
        if k_cache.shape[-4] != B:
            raise ValueError(f"{B} rows of queries, and a cache {k_cache.shape} of other rows")
    elif page_table_BM.ndim != 2 or len(page_table_BM) != B or not page_table_BM.size:
        raise ValueError(f"{B} rows take a page table ({B}, M), got {page_table_BM.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")


def of_heads_K(scale, K: int):
    """A scale for each key head, float32: 1 for None.

    Raises:
      ValueError: it is neither a scalar nor one number a head.
    """
    scale = jnp.asarray(1.0 if scale is None else scale, jnp.float32)
    if scale.shape not in ((), (K,)):
        raise ValueError(f"a cache's scale is a scalar or ({K},), got {scale.shape}")
    return jnp.broadcast_to(scale, (K,))
