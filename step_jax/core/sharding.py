"""Device meshes, and the one ordered table from logical axis names to mesh axes.

Model code names the *meaning* of an axis (``batch``, ``heads``, ``embed``); the rules say where it
lives. Model code stays single-device code: the only words about parallelism in it are
:meth:`Sharding.constrain` at the places where the layout of an activation is a decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from step_jax.core import hardware
from step_jax.core.errors import ConfigError
from step_jax.core.spec import map_specs

MeshAxes = tuple[str, ...]

AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """How many ways each kind of parallelism splits the devices; one of them may be -1 (the rest).

    pipeline: stages, each with a part of the layers (``models.pipeline``); outside them, rows of
      the batch. Leftmost, so that it is what crosses the slowest links.
    pipeline_rounds: times that a microbatch visits every stage; more rounds idle less, but the
      layers' parameters change place once a step.
    pipeline_microbatches: pieces of the batch, a multiple of the stages; 0 for the most, up to four
      per stage, that the rows allow.
    data: replicas of the parameters, each with its own rows of the batch.
    fsdp: rows of the batch too, but parameters and optimizer state are split and gathered at use.
    expert: experts of a mixture (rows of the batch elsewhere).
    context: pieces of every sequence.
    tensor: heads, hidden units and vocabulary.
    ring: with several key/value heads, pass them around the context axis instead of gathering them.
    ulysses: with several key/value heads, give every device of the context axis whole sequences of
      some heads while attention is computed (arXiv 2309.14509).
    spare: the last so many devices are left out of this mesh, for another one beside it (the
      ``rollout.parallel`` of reinforcement learning).
    multihost: join the other processes of a cluster job (see ``core.distributed``).
    """

    pipeline: int = 1
    pipeline_rounds: int = 1
    pipeline_microbatches: int = 0
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    ring: bool = False
    ulysses: bool = False
    spare: int = 0
    multihost: bool = False

    def validate(self):
        sizes = self.sizes()
        bad = {k: v for k, v in sizes.items() if v < 1 and v != -1}
        if bad:
            raise ConfigError(
                f"mesh axes must be positive, or -1 for the rest of the devices: {bad}"
            )
        if sum(v == -1 for v in sizes.values()) > 1:
            raise ConfigError("only one mesh axis can be -1 (the rest of the devices)")
        if self.ring and self.ulysses:
            raise ConfigError("parallel has ring and ulysses: attention crosses the axis one way")
        if self.spare < 0:
            raise ConfigError(f"parallel.spare is {self.spare}; it must be 0 or more")
        if self.pipeline_rounds < 1 or self.pipeline_microbatches < 0:
            raise ConfigError(
                f"pipeline_rounds is {self.pipeline_rounds} (at least 1) and pipeline_microbatches "
                f"{self.pipeline_microbatches} (at least 0)"
            )
        if self.pipeline == 1 and (self.pipeline_rounds, self.pipeline_microbatches) != (1, 0):
            raise ConfigError("pipeline_rounds and pipeline_microbatches need parallel.pipeline")
        if self.pipeline > 0 and self.pipeline_microbatches % self.pipeline:
            raise ConfigError(
                f"pipeline_microbatches {self.pipeline_microbatches} is no multiple of the "
                f"{self.pipeline} stages of parallel.pipeline"
            )

    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def resolve(self, devices: int) -> MeshConfig:
        """The same with -1 replaced. Raises ConfigError if the sizes do not make ``devices``."""
        self.validate()
        sizes = self.sizes()
        known = math.prod(v for v in sizes.values() if v != -1)
        rest = [k for k, v in sizes.items() if v == -1]
        if rest and devices % known == 0:
            sizes[rest[0]] = devices // known
        if math.prod(sizes.values()) != devices:
            shape = " x ".join(f"{k}={v}" for k, v in sizes.items() if v != 1) or "1"
            hint = (
                f"{known}, the product of the others, must divide {devices}"
                if rest
                else "set one axis of `parallel` to -1 to let it take the rest"
            )
            raise ConfigError(f"the mesh {shape} does not match the {devices} devices; {hint}")
        return replace(self, **sizes)  # type: ignore[arg-type]  # the sizes are no flags


def make_mesh(config: MeshConfig, devices: Sequence | None = None) -> Mesh:
    """A mesh with the axes of :class:`MeshConfig`, the rightmost ones on the nearest devices.

    With several slices of TPUs the leftmost axis whose size they divide goes across them: between
    slices is only the data centre's network.

    Raises:
      ConfigError: sizes that do not make the devices, or that no slice can be cut from.
    """
    devices = list(_all() if devices is None else devices)
    config = config.resolve(len(devices))
    shape = tuple(config.sizes().values())
    types = (AxisType.Auto,) * len(AXES)
    if len(devices) == 1:
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)
    return Mesh(_arrange(shape, devices), AXES, axis_types=types)


def _all() -> Sequence:
    hardware.leave_out_absent_tpus()
    return jax.devices()


def _arrange(shape: tuple[int, ...], devices: Sequence) -> np.ndarray:
    """The devices as an array of ``shape`` that lies well on their torus and their slices."""
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        try:
            return mesh_utils.create_device_mesh(shape, devices)
        except NotImplementedError:  # no axis of the torus (or product of some) has these sizes
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = next((i for i, size in enumerate(shape) if size % slices == 0), None)
    if across is None:
        sizes = " x ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True) if n > 1)
        raise ConfigError(f"no axis of the mesh {sizes} can be cut into {slices} slices")
    outer = tuple(slices if i == across else 1 for i in range(len(shape)))
    inner = tuple(n // o for n, o in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


#: (logical axis, mesh axes). Where a name stands twice the second line is the fall-back for sizes
#: that do not divide; without one, a size that does not divide is an error.
DEFAULT_RULES: tuple[tuple[str, MeshAxes], ...] = (
    # activations
    ("batch", ("pipeline", "data", "fsdp", "expert")),
    ("sequence", ("context",)),
    # parameters: FSDP splits the model width, and the rank of a weight that has no width. Also over
    # the context axis, and the expert axis for what are no experts: its devices would all keep the
    # same weights, and add up whole gradients
    ("embed", ("fsdp", "expert", "context")),
    ("embed", ("fsdp", "context")),
    ("embed", ("fsdp",)),
    ("rank", ("fsdp", "expert", "context")),
    ("rank", ("fsdp", "context")),
    ("rank", ("fsdp",)),
    ("rank", ()),
    # both
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("kv_heads", ()),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("experts", ("expert",)),
    # stages, if the layers divide; else they are whole on every one (models.pipeline)
    ("layers", ("pipeline",)),
    ("layers", ()),
)


def axes_of_entry(entry: str | MeshAxes | None) -> MeshAxes:
    """The mesh axes that an entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


#: Logical axes of parameters that are whole while a layer computes (see ``models.trunk.gather``).
GATHERED_AXES = ("embed", "rank")


@dataclass(frozen=True)
class Sharding:
    """A mesh with its rule table: turns logical axes into shardings.

    ``ring`` and ``ulysses`` choose how attention with several key/value heads crosses the context
    axis: keys and values travel around it, or heads are exchanged for the sequence, or (neither)
    keys and values are gathered, the better choice for the single shared head of MFA and MQA, and
    the only one there. ``rounds`` and ``microbatches`` are the
    ``pipeline_`` settings of :class:`MeshConfig`;
    ``one_stage`` says that this is the layout inside a stage. ``spare`` are devices that were left
    out of the mesh.
    """

    mesh: Mesh
    rules: tuple[tuple[str, MeshAxes], ...] = DEFAULT_RULES
    ring: bool = False
    ulysses: bool = False
    rounds: int = 1
    microbatches: int = 0
    one_stage: bool = False
    spare: tuple = ()

    @classmethod
    def build(cls, config: MeshConfig, devices: Sequence | None = None) -> Sharding:
        """The layout on a mesh of ``devices`` (None: of all). Errors as :func:`make_mesh`."""
        devices = list(_all() if devices is None else devices)
        left = len(devices) - config.spare
        if left < 1:
            raise ConfigError(
                f"parallel.spare is {config.spare} of {len(devices)} devices: none is left"
            )
        return cls(
            make_mesh(config, devices[:left]),
            spare=tuple(devices[left:]),
            ring=config.ring,
            ulysses=config.ulysses,
            rounds=config.pipeline_rounds,
            microbatches=config.pipeline_microbatches,
        )

    def size(self, *axes: str) -> int:
        return math.prod(self.mesh.shape[a] for a in axes)

    def mesh_axes(self, name: str) -> MeshAxes:
        """The mesh axes on which a logical axis (of a size that divides) lies."""
        return next(mesh_axes for rule, mesh_axes in self.rules if rule == name)

    def ways(self, name: str) -> int:
        """Into how many pieces the rules cut a logical axis (of a size that divides)."""
        return self.size(*self.mesh_axes(name))

    def of_one_stage(self) -> Sharding:
        """The layout inside one stage of the pipeline: that of a mesh without the axis."""
        rules = tuple((n, tuple(a for a in axes if a != "pipeline")) for n, axes in self.rules)
        return replace(self, rules=rules, one_stage=True)

    def for_inference(self) -> Sharding:
        """The same but that the axes of experts and of the context cut no other parameters.

        In a training step a gathered matrix serves a batch; while text is written it would be
        gathered for every token. Where memory is short the ``fsdp`` axis still cuts all. A
        vocabulary that the ``tensor`` axis does not divide is whole.
        """
        cut = {"embed": ("fsdp",), "rank": ("fsdp",)}
        rules = tuple((name, axes and cut.get(name, axes)) for name, axes in self.rules)
        return replace(self, rules=(*rules, ("vocab", ())))

    def of_whole_sequences(self) -> Sharding:
        """The same but that sequences are whole on every device: for the short texts beside long
        rows, whose lengths no context axis divides."""
        rules = tuple((n, () if n == "sequence" else axes) for n, axes in self.rules)
        return replace(self, rules=rules, ring=False, ulysses=False)

    def of_whole_heads(self) -> Sharding:
        """That in which ``ulysses`` computes attention: the context axis cuts heads."""
        whole = self.of_whole_sequences()
        heads = ("heads", "kv_heads")
        kept = tuple((n, axes) for n, axes in whole.rules if n not in heads)
        return replace(whole, rules=(*kept, *((n, ("tensor", "context")) for n in heads)))

    def spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Raises:
          ConfigError: a size that its mesh axes do not divide, or an axis without a rule.
        """
        used: set[str] = set()
        entries = []
        for name, size in zip(axes, shape, strict=True):
            entry = () if name is None else self._mesh_axes(name, size, used)
            used.update(entry)
            entries.append(entry if len(entry) > 1 else (entry[0] if entry else None))
        return PartitionSpec(*entries)

    def _mesh_axes(self, name: str, size: int, used: set[str]) -> MeshAxes:
        candidates = [mesh_axes for rule, mesh_axes in self.rules if rule == name]
        if not candidates:
            raise ConfigError(f"no sharding rule for the logical axis {name!r}")
        for mesh_axes in candidates:
            free = tuple(a for a in mesh_axes if a not in used and self.mesh.shape[a] > 1)
            if size % self.size(*free) == 0:
                return free
        ways = " x ".join(f"{a}={self.mesh.shape[a]}" for a in candidates[-1])
        fits = [n for n in range(1, size + 1) if size % n == 0]
        few = ", ".join(map(str, fits[:12])) + (", ..." if len(fits) > 12 else "")
        raise ConfigError(
            f"the logical axis {name!r} has size {size}, which the mesh axes {ways} do not divide: "
            f"it can be cut into {few}"
        )

    def named(self, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def constrain(self, x, *axes: str | None):
        """Fixes the layout of an activation. Nothing happens on a mesh of one device."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.named(axes, x.shape))

    def shard_map(self, f: Callable, in_specs: tuple, out_specs) -> Callable:
        """``jax.shard_map`` over this mesh, for use inside a pipeline's stages as well.

        Those are computed under ``vmap`` with one stage per device. ``f`` is not batched but called
        with that stage's arrays: it need not know (and jax 0.12 mistypes what loops give when
        ``vmap`` goes through a ``shard_map``).

        Args:
          f: (arrays) -> arrays, all of one device.
          in_specs, out_specs: PartitionSpecs, a tree of them for each argument and the result.
        """
        mapped = jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)
        if not self.one_stage:
            return mapped
        mapped = jax.custom_batching.custom_vmap(mapped)

        @mapped.def_vmap
        def all_stages(stages, batched, *arrays):
            def stacked(a, batched):
                return a if batched else jnp.broadcast_to(a, (stages, *a.shape))

            def local(*arrays):
                out = f(*jax.tree.map(lambda a: a[0], arrays))
                return jax.tree.map(lambda a: a[None], out)

            specs = jax.tree.map(lambda s: PartitionSpec("pipeline", *s), (in_specs, out_specs))
            out = jax.shard_map(local, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1])(
                *jax.tree.map(stacked, arrays, tuple(batched))
            )
            return out, jax.tree.map(lambda _: True, out)

        return mapped

    def partition_specs(self, specs):
        """A tree of PartitionSpec for a tree of ParamSpec."""
        return map_specs(lambda s: self.spec(s.axes, s.shape), specs)

    def params(self, specs):
        """A tree of NamedSharding for a tree of ParamSpec."""
        return map_specs(lambda s: self.named(s.axes, s.shape), specs)

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def laid_out(a, where) -> jax.ShapeDtypeStruct:
    """An abstract array with its sharding."""
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)


def bytes_on_device(tree) -> int:
    """What a device holds of arrays, or abstract ones, with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def varying_axes(x) -> frozenset[str]:
    """Inside ``shard_map``: the mesh axes on whose devices ``x`` may differ."""
    return jax.typeof(x).manual_axis_type.varying


def vary_alike(*arrays):
    """The arrays, each declared to differ on all mesh axes on which any of them does.

    A custom derivative must hand back gradients that vary as its arguments do. Outside
    ``shard_map`` nothing happens.
    """
    axes = frozenset().union(*map(varying_axes, arrays))

    def alike(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(map(alike, arrays))
