"""A decode call: attention of new tokens over a cache that already holds them.

Shape suffixes: B rows (sequences), T new tokens of a row, N query heads, K key/value heads, G query
heads of a key head, H head width, S slots of a row, L pages of a pool, M pages of a row, F = H / 2
frequencies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """What the decode kernels of all platforms are given, and their reference.

    q_BTNH: rotated to their positions.
    k_cache, v_cache: (B, S, K, H), or (L, page, K, H) with a page table. Position p of a row lies
      in slot ``p % S`` (``S = M * page`` if paged). What was never written must be finite.
      ``v_cache`` None: values are the keys as cached.
    positions_BT: int32 positions of the queries; a negative one sees nothing.
    lengths_B: int32 tokens stored, those of this call included.
    scale: multiplies the scores.
    window: a query sees itself and the ``window - 1`` positions before it; None for all.
    frequency_F: float32; keys are cached unrotated and coordinate pairs ``(i, i + H/2)`` are
      rotated by ``position * frequency_F[i]`` after reading. None: keys are used as cached.
    k_scale, v_scale: float32 scalar or (K,): what cached numbers are multiplied by, None for 1.
    page_table_BM: int32 page of every M-th part of a row's slots; entries behind a row's last token
      are not read.
    layer: int32 scalar; the caches then have a leading axis of layers, of which one is read where
      it lies.
    first_head, heads_per_key: if the caller holds a slice of the query heads but all key heads: the
      number of its first head (None for 0) and G.

    The result is (B, T, N, H) in the dtype of the queries, zeros where a query sees nothing.
    Scores, softmax and sums are float32.
    """

    q_BTNH: Any
    k_cache: Any
    v_cache: Any
    positions_BT: Any
    lengths_B: Any
    _: dataclasses.KW_ONLY
    scale: float = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    frequency_F: Any = None
    k_scale: Any = None
    v_scale: Any = None
    page_table_BM: Any = None
    layer: Any = None
    first_head: Any = None
    heads_per_key: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def caches(self) -> list:
        """What is read: keys and values, or the one array that is both."""
        return [self.k_cache] if self.v_cache is None else [self.k_cache, self.v_cache]

    @property
    def paged(self) -> bool:
        return self.page_table_BM is not None

    @property
    def page(self) -> int:
        """Slots that lie together: those of a page, or of a row."""
        return self.k_cache.shape[-3]

    @property
    def slots(self) -> int:
        """Of a row."""
        return self.page * self.page_table_BM.shape[1] if self.paged else self.page

    @property
    def kv_heads(self) -> int:
        return self.k_cache.shape[-2]

    def first_part(self):
        """Int32 place of the layer's first row or page, were all layers' in one list."""
        parts = self.k_cache.shape[-4]
        return jnp.int32(0) if self.layer is None else jnp.asarray(self.layer, jnp.int32) * parts

    def key_head_N(self):
        """Int32 number of every query head's key head."""
        N = self.q_BTNH.shape[2]
        first = 0 if self.first_head is None else jnp.asarray(self.first_head, jnp.int32)
        return (first + jnp.arange(N, dtype=jnp.int32)) // (
            self.heads_per_key or N // self.kv_heads
        )

    def scales_K(self, scale):
        """``k_scale`` or ``v_scale`` for each key head, float32: 1 for None."""
        scale = jnp.asarray(1.0 if scale is None else scale, jnp.float32)
        return jnp.broadcast_to(scale, (self.kv_heads,))

    def check(self) -> None:
        """Raises ValueError for arguments that do not fit each other."""
        q, k = self.q_BTNH, self.k_cache
        if q.ndim != 4 or k.ndim not in (4, 5):
            raise ValueError(
                "expected queries (B, T, N, H) and caches (B, S, K, H), pages (L, page, K, H) or "
                f"stacks of either, got {q.shape} and {k.shape}"
            )
        axes, given = (4, "without") if self.layer is None else (5, "with")
        if k.ndim != axes:
            raise ValueError(f"a cache {given} `layer` has {axes} axes, got {k.shape}")
        (B, T, N, _), K = q.shape, self.kv_heads
        if self.heads_per_key is not None and self.heads_per_key < 1:
            raise ValueError(f"heads_per_key must be at least 1, got {self.heads_per_key}")
        if self.heads_per_key is None and N % K:
            raise ValueError(f"{N} query heads are not a multiple of {K} key/value heads")
        positions, lengths, table = self.positions_BT, self.lengths_B, self.page_table_BM
        if positions.shape != (B, T) or lengths.shape != (B,):
            raise ValueError(
                f"{B} rows of {T} queries take positions {(B, T)} and lengths {(B,)}, got "
                f"{positions.shape} and {lengths.shape}"
            )
        integers = [positions, lengths, *([] if table is None else [table])]
        if any(x.dtype != jnp.int32 for x in integers):
            found = ", ".join(str(x.dtype) for x in integers)
            raise ValueError(f"positions, lengths and page tables are int32, got {found}")
        if table is None:
            if k.shape[-4] != B:
                raise ValueError(f"{B} rows of queries, and a cache {k.shape} of other rows")
        elif table.ndim != 2 or len(table) != B or not table.size:
            raise ValueError(f"{B} rows take a page table ({B}, M), got {table.shape}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        for scale in (self.k_scale, self.v_scale):
            if jnp.shape(scale) not in ((), (K,)) and scale is not None:
                raise ValueError(f"a cache's scale is a scalar or ({K},), got {jnp.shape(scale)}")


@dataclasses.dataclass(frozen=True)
class Support:
    """Of one kernel: its name in messages, and the dtypes it takes."""

    kernel: str
    query_dtypes: tuple[str, ...]
    cache_dtypes: tuple[str, ...]

    def check(self, call: DecodeCall, splits: int | None = None) -> None:
        """Raises ValueError for a call that no decode kernel, or not this one, takes."""
        call.check()
        q, k, v = call.q_BTNH, call.k_cache, call.v_cache
        H = q.shape[3]
        if 0 in q.shape or 0 in k.shape:
            raise ValueError(f"nothing to decode: {q.shape} queries, {k.shape} cache")
        if k.shape[-1] != H or (v is not None and v.shape != k.shape):
            raise ValueError(
                f"queries of width {H}, keys {k.shape}, values {None if v is None else v.shape}; "
                f"the {self.kernel} supports one width for all and caches of one shape"
            )
        if q.dtype.name not in self.query_dtypes:
            supported = ", ".join(self.query_dtypes)
            raise ValueError(f"queries are {q.dtype.name}; the {self.kernel} supports {supported}")
        if k.dtype.name not in self.cache_dtypes:
            supported = ", ".join(self.cache_dtypes)
            raise ValueError(f"the cache is {k.dtype.name}; the {self.kernel} supports {supported}")
        if v is not None and v.dtype != k.dtype:
            raise ValueError(f"keys are {k.dtype} and values {v.dtype}, which must agree")
        if call.frequency_F is not None and call.frequency_F.shape != (H // 2,):
            raise ValueError(
                f"{call.frequency_F.shape} frequencies for width {H}; the {self.kernel} rotates "
                f"keys over their whole width, which takes ({H // 2},)"
            )
        if splits is not None and splits < 1:
            raise ValueError(f"splits must be at least 1, got {splits}")
