"""Where the tokens of a call stand: order, document, place and block, one description of each.

Shape suffixes: B batch, T tokens of this call, A axes of a place.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Tokens:
    """What attention is told of the tokens besides their vectors.

    Attributes:
      order_BT: int32 causal order in the document, and the slot that a cache keeps a token in;
        negative for padding of a cached call (such tokens are not stored, and nobody sees them).
      segments_BT: int32 documents of packed rows, 0 for padding; None when a row is one document.
      place_BTA: coordinates that rotary embeddings rotate by, int32 or float32: one axis for text,
        (row, column) for pictures, (time, row, column) for clips. None: the order is the place.
      block_BT: int32. Tokens of one document with the same number see each other whatever their
        order and the window (a picture or noised latents in a causal row); negative: no block. All
        tokens of a block are of one call. None when there are no blocks.
      causal: tokens do not see later ones, but for those of their block. False: a token sees its
        whole document.
    """

    order_BT: jax.Array
    segments_BT: jax.Array | None = None
    place_BTA: jax.Array | None = None
    block_BT: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=True)

    @staticmethod
    def in_order(rows: int, length: int, *, causal: bool = True) -> Tokens:
        """Every row one document of ``length`` tokens: 0, 1, 2, ..."""
        order_T = jnp.arange(length, dtype=jnp.int32)
        return Tokens(jnp.broadcast_to(order_T, (rows, length)), causal=causal)

    @staticmethod
    def packed(batch: Mapping[str, jax.Array]) -> Tokens:
        """Those of a batch of packed text: its ``positions`` and ``segments``, int32 (B, T)."""
        return Tokens(batch["positions"], batch["segments"])

    @property
    def places_BTA(self):
        """The coordinates to rotate by; the order where nothing else is said."""
        return self.order_BT[..., None] if self.place_BTA is None else self.place_BTA

    def counted_BT(self):
        """Which tokens are text and not padding."""
        counted_BT = self.order_BT >= 0
        return counted_BT if self.segments_BT is None else counted_BT & (self.segments_BT > 0)

    def nowhere(self) -> Tokens:
        """The fill of padding that nobody sees: a number in the place of every array."""
        return jax.tree.map(lambda _: 0, self).replace(
            order_BT=-1, block_BT=None if self.block_BT is None else -1
        )
