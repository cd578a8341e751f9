"""How the kernels for TPUs cut a width."""

from jax.experimental import pallas as pl

LANES = 128
UNIT = 256  # width of the newer chips' matrix units
_COLUMN = 64  # numbers of a width that a block costs besides its own: what meets it is read again


def lanes(width: int) -> int:
    """The width as it lies in registers: in whole lanes."""
    return pl.cdiv(width, LANES) * LANES


def block(width: int, most: int, ways: int = 1) -> int:
    """The block of at most ``most`` that covers a width at the least cost, the last one in part.

    Of whole lanes, or the width itself; at least a lane tile. ``ways``: cores, on which the blocks
    are shared out.
    """
    sizes = list(range(LANES, min(width - 1, most) + 1, LANES))
    if width <= max(most, LANES):
        sizes.append(width)

    def cost(size: int) -> int:
        return pl.cdiv(pl.cdiv(width, size), ways) * (lanes(size) + _COLUMN)

    return min(reversed(sizes), key=cost)


def chunks(width: int, most: int, body) -> None:
    """``body(slice)`` for chunks of one length, about ``most``, and for what is left of a width.

    What is compiled is one chunk and the rest. Chunks fill whole matrix units: the last one of each
    would else be computed half empty, as often as there are chunks.
    """
    pieces = pl.cdiv(width, max(most, LANES))
    chunk = width if pieces == 1 else min(width, pl.cdiv(pl.cdiv(width, pieces), UNIT) * UNIT)
    whole = width // chunk
    if whole == 1:
        body(pl.ds(0, chunk))
    else:
        pl.loop(0, whole)(lambda i: body(pl.ds(pl.multiple_of(i * chunk, chunk), chunk)))
    if width % chunk:
        body(pl.ds(whole * chunk, width % chunk))
