"""Parameter specifications: the one table from which everything about a parameter is derived.

A model describes its parameters once, as a tree (the same ``flax.struct.dataclass`` types that will
hold the arrays) whose leaves are :class:`ParamSpec`. Initialisation, sharding, counting, optimizer
groups, weight decay, checkpoint layout and weight import are functions over that tree.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from step_jax.core.errors import ConfigError

Role = Literal["matrix", "embedding", "head", "vector", "router", "balance"]

#: Roles whose arrays stay float32 when a step casts parameters to its compute dtype.
FLOAT32_ROLES = ("router", "balance")

#: Logical axes that stack independent parameters of one kind; never part of a matrix.
STACK_AXES = ("layers", "experts")


@dataclass(frozen=True)
class Normal:
    """Normal initialisation with standard deviation ``std``.

    ``depth`` scales the deviation of a layer's parameter: ``"none"`` not at all, ``"layer"`` by
    ``1/sqrt(2*(l+1))`` with the layer's own index (the MFA paper's choice for the GLU
    down-projection, arXiv 2412.19255).
    """

    std: float
    depth: Literal["none", "layer"] = "none"

    def __call__(self, key, shape, dtype, layer=0):
        x = jax.random.normal(key, shape, jnp.float32) * self.std
        if self.depth == "layer":
            x = x / jnp.sqrt(2.0 * (layer + 1))
        return x.astype(dtype)


@dataclass(frozen=True)
class Constant:
    """Every element equal to ``value``."""

    value: float

    def __call__(self, key, shape, dtype, layer=0):
        return jnp.full(shape, self.value, dtype)


@dataclass(frozen=True)
class ConstantRows:
    """A table whose row m is all ``values[m]``."""

    values: tuple[float, ...]

    def __call__(self, key, shape, dtype, layer=0):
        rows = jnp.asarray(self.values, dtype).reshape(-1, *[1] * (len(shape) - 1))
        return jnp.broadcast_to(rows, shape)


Init = Normal | Constant | ConstantRows
ZEROS = Constant(0.0)
ONES = Constant(1.0)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical name of every axis, and how it starts.

    Attributes:
      shape: the full shape, stacked axes included.
      axes: one logical name per axis (``None``: never sharded).
      init: called as ``init(key, shape, dtype, layer=index)`` once per stacked layer.
      role: which optimizer group it belongs to. ``matrix`` multiplies activations, ``embedding``
        is looked up, ``head`` makes logits, ``vector`` is everything element-wise (never decayed),
        ``router`` scores experts, ``balance`` is a selection bias: its gradient is the experts'
        load above the mean, and its update that gradient's sign times ``balance_rate``.
      fan_in: how many axes after the stacked ones are contracted with the activation, so a query
        weight (D, N, H) has 1 and an output weight (N, H, D) has 2.
      dtype: of the stored (master) parameter.
      active: the share of the parameter that one token uses (top-k of all experts).
      trainable: False for what an optimizer must leave as it is.
      balance_rate: of a ``balance`` parameter: its step while the learning rate is at its peak.
      rate: multiplies the learning rate, and so the decay too.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    role: Role = "matrix"
    fan_in: int = 1
    dtype: Any = jnp.float32
    active: float = 1.0
    trainable: bool = True
    balance_rate: float = 0.0
    rate: float = 1.0

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
        if any(d <= 0 for d in self.shape):
            raise ValueError(f"a parameter with axes {self.axes} has shape {self.shape}")

    @property
    def stacked(self) -> int:
        """How many leading axes stack parameters of one kind."""
        return sum(axis in STACK_AXES for axis in self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[tuple[int, ...], int, int]:
        """(stacked sizes, rows, columns): the parameter as a stack of input-by-output matrices."""
        s = self.stacked
        rows = math.prod(self.shape[s : s + self.fan_in])
        return self.shape[:s], rows, math.prod(self.shape[s + self.fan_in :])


def is_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def map_specs(f: Callable, specs, *rest):
    """``jax.tree.map`` over a tree of ParamSpec (and trees of arrays of the same structure)."""
    return jax.tree.map(f, specs, *rest, is_leaf=is_spec)


def stack(specs, n: int):
    """Specs of ``n`` layers held in one array per parameter, on a leading ``layers`` axis."""
    return map_specs(
        lambda s: replace(s, shape=(n, *s.shape), axes=("layers", *s.axes)),
        specs,
    )


def _init_leaf(spec: ParamSpec, key, first: int, stride: int):
    if "layers" not in spec.axes:
        return spec.init(key, spec.shape, spec.dtype, layer=first)
    n, *shape = spec.shape

    def one(i):
        layer = first + stride * i
        return spec.init(jax.random.fold_in(key, i), tuple(shape), spec.dtype, layer=layer)

    return jax.vmap(one)(jnp.arange(n))


def path_name(path) -> str:
    """``layers/0/attention/query`` for a key path of a parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init(specs, key, layers: Callable[[str], tuple[int, int]] = lambda name: (0, 1)):
    """Arrays for ``specs``.

    Every parameter's key comes from its own path, so adding one leaves the others' values alone.
    ``layers`` says, by a parameter's path, the index in the whole model of its first layer and the
    distance to the next one of the stack, for initialisations that depend on depth.
    """

    def leaf(path, spec):
        name = path_name(path)
        return _init_leaf(spec, jax.random.fold_in(key, zlib.crc32(name.encode())), *layers(name))

    return jax.tree_util.tree_map_with_path(leaf, specs, is_leaf=is_spec)


def by_name(specs) -> dict[str, ParamSpec]:
    """Path -> spec of every parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    return {path_name(path): spec for path, spec in leaves}


def matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names of parameters that any of the patterns names.

    Args:
      patterns: paths in which ``*`` stands for anything: ``groups/0/*``, ``*/attention/key_DC``. A
        path of what holds parameters names all of them: ``groups/0``.

    Raises:
      ConfigError: a pattern that names none; it lists what there is.
    """
    names, found = list(names), set()
    for pattern in patterns:
        wanted = re.compile("".join(".*" if c == "*" else re.escape(c) for c in pattern))
        hits = {n for n in names if any(wanted.fullmatch(p) for p in (n, *_holders(n)))}
        if not hits:
            raise ConfigError(f"no parameter is named {pattern!r}; there are: {', '.join(names)}")
        found |= hits
    return found


def _holders(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def map_names(f: Callable[[str], Any], specs):
    """A tree of ``f(path)`` for every parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: f(path_name(path)), specs, is_leaf=is_spec
    )


def freeze(specs, patterns: Sequence[str]):
    """The table with the matching parameters (see :func:`matching`) not trainable."""
    frozen = matching(by_name(specs), patterns)

    def leaf(path, spec):
        return replace(spec, trainable=False) if path_name(path) in frozen else spec

    return jax.tree_util.tree_map_with_path(leaf, specs, is_leaf=is_spec)


def trained(specs, tree=None):
    """``tree`` (the table itself if None) with None in the place of every frozen parameter."""
    tree = specs if tree is None else tree
    return map_specs(lambda s, a: a if s.trainable else None, specs, tree)


def completed(specs, trained, whole):
    """The inverse of :func:`trained`, with the frozen parameters of ``whole``."""
    return map_specs(lambda s, a, b: a if s.trainable else b, specs, trained, whole)


def abstract(specs, shardings=None):
    """``jax.ShapeDtypeStruct`` for every spec (with shardings if a tree of them is given)."""
    if shardings is None:
        return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
    return map_specs(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), specs, shardings
    )


def cast(params, dtype, specs):
    """Parameters in the compute dtype; those of ``FLOAT32_ROLES`` as they are."""
    return map_specs(lambda s, p: p if s.role in FLOAT32_ROLES else p.astype(dtype), specs, params)


def count(specs, roles: tuple[Role, ...] | None = None, *, active: bool = False) -> int:
    """Number of parameters, of the given roles only if any are given.

    ``active`` counts what one token uses: of a stack of experts, those it is sent to.
    """
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    kept = [s for s in leaves if roles is None or s.role in roles]
    return round(sum(s.size * (s.active if active else 1) for s in kept))
