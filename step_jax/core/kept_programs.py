"""Compiled programs on disk: a run that is started again need not compile again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from step_jax.core.files import cache_folder


@contextlib.contextmanager
def kept(mesh: Mesh) -> Iterator[None]:
    """Keeps what is compiled for a mesh in ``$XDG_CACHE_HOME/step_jax/programs`` (default
    ``~/.cache``), unless ``JAX_COMPILATION_CACHE_DIR`` names another folder.

    Not what is compiled for several CPU devices: read back, such a program may start its
    collectives in another order on every device, which then wait for each other for ever (jaxlib
    0.11 and 0.12; two of six starts of a small run of two devices, none of six that compiled).
    """
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        with not_kept():
            yield
        return
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("programs")))
    yield


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """Everything is compiled anew, and nothing of it is kept."""
    was = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it remembers whether it is used
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()
