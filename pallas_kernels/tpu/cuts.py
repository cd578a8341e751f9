"""How the kernels for TPUs cut a width."""

from jax.experimental import pallas as pl

LANES = 128


def divisor(width: int, most: int) -> int:
    """The largest multiple of 128 up to ``most``, itself at least 128, that divides ``width``.

    ``width`` if there is none.
    """
    sizes = [n for n in range(LANES, min(width, max(most, LANES)) + 1, LANES) if width % n == 0]
    return max(sizes, default=width)


def chunks(width: int, most: int, body) -> None:
    """``body(slice)`` for every chunk of a width, each of :func:`divisor`; only one is compiled."""
    chunk = divisor(width, most)
    if chunk == width:
        body(pl.ds(0, width))
    else:
        pl.loop(0, width // chunk)(lambda i: body(pl.ds(pl.multiple_of(i * chunk, chunk), chunk)))
