"""From tensors of the Hugging Face layout to parameters, straight to the devices that hold them.

A tensor is read once, and each device is handed its own part of it in the file's type and order.
Turning, reordering and widening happen there, in place in the parameter: beside what devices hold,
the host never has more than one tensor.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core.errors import CheckpointError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.core.spec import ParamSpec, by_name, map_names
from step_jax.interop.hf.families import config_from_hf, text_keys
from step_jax.interop.hf.files import read_config, read_folder
from step_jax.interop.hf.fp8 import check_quantization, dequantized
from step_jax.interop.hf.keys import Keys
from step_jax.interop.hf.tensors import Tensor, layout, left_out
from step_jax.models.text.decoder import Decoder, DecoderParams


def load_hf(path: str | Path, sharding: Sharding | None = None) -> tuple[Decoder, DecoderParams]:
    """Configuration and parameters of a folder with config.json and .safetensors files.

    Args:
      path: the folder; which of its files count is said in ``files.py``.
      sharding: where the parameters are to lie; None for the first device.

    Raises:
      CheckpointError: a file is missing or damaged, the tensors do not fit config.json, or values
        are not finite numbers (each is named).
      ConfigError: as ``config_from_hf``.
    """
    path = Path(path).expanduser()
    hf_config = read_config(path)
    config = config_from_hf(hf_config)
    text = Keys(text_keys(hf_config), "config.json")
    ignored = left_out(hf_config)
    stored = {k: v for k, v in read_folder(path).items() if not ignored.match(k)}
    params = params_from_hf(
        dequantized(stored, check_quantization(text)),
        config,
        rope_interleave=text.flag("rope_interleave", True),
        sharding=sharding,
    )
    return config, params


def params_from_hf(
    state: Mapping[str, Any],
    config: Decoder,
    *,
    rope_interleave: bool = True,
    ignored: re.Pattern | None = None,
    sharding: Sharding | None = None,
) -> DecoderParams:
    """Parameters of ``config`` as arrays of the specs' dtype.

    Args:
      state: tensor name -> array of any float dtype, or what becomes one by ``np.asarray``; read
        one tensor at a time.
      config: usually from ``config_from_hf``.
      rope_interleave: of DeepSeek-V3's config.json; other families do not have it.
      ignored: names of tensors that may be there without being read, see ``left_out``.
      sharding: where the parameters are to lie; None for the first device.

    Raises:
      CheckpointError: another number of experts; or names every tensor that is missing, unused, of
        another shape or no float, or the first that holds NaN or infinite values.
      ConfigError: ``config`` has parameters without a tensor.
    """
    tensors, _ = layout(config, rope_interleave)
    _check_experts(state, tensors)
    # Buffers that older versions of the library saved, and a head that is the embedding.
    spare = {k for k in state if k.endswith("rotary_emb.inv_freq")}
    if ignored is not None:
        spare |= {k for k in state if ignored.match(k)}
    if config.tied and "lm_head.weight" in state and _same_as_embedding(state):
        spare.add("lm_head.weight")
    return read_params(state, tensors, config.specs(), sharding, spare)


def read_params(
    state: Mapping[str, Any],
    tensors: list[Tensor],
    specs: Any,
    sharding: Sharding | None = None,
    spare: Collection[str] = (),
) -> Any:
    """The parameters of a table, each filled by its tensors; see :func:`params_from_hf`.

    Args:
      specs: the table, a tree of ParamSpec.
      spare: names of tensors that may be there without being read.

    Raises:
      CheckpointError: as ``params_from_hf``.
    """
    _check_state(state, tensors, spare)
    if sharding is None:
        sharding = Sharding.build(MeshConfig(), jax.local_devices()[:1])
    leaves = {path: _Leaf(spec, sharding) for path, spec in by_name(specs).items()}
    for tensor in tensors:
        view = _float_view(state[tensor.name], tensor)
        for leaf, order in tensor.parts():
            leaves[leaf].fill(tensor, order, view)
    return map_names(lambda name: leaves[name].array(), specs)


def _check_state(state, tensors: list[Tensor], spare: Collection[str]) -> None:
    unused = state.keys() - set(spare) - {t.name for t in tensors}
    problems = [f"missing {t.name} {t.their_shape}" for t in tensors if t.name not in state]
    problems += [f"unused {name} {tuple(state[name].shape)}" for name in sorted(unused)]
    for t in tensors:
        if t.name not in state:
            continue
        shape, dtype = tuple(state[t.name].shape), state[t.name].dtype
        if shape != t.their_shape:
            problems.append(f"{t.name} has shape {shape}, expected {t.their_shape}")
        elif not jnp.issubdtype(dtype, jnp.floating) or np.dtype(dtype).itemsize < 2:
            problems.append(f"{t.name} is {np.dtype(dtype)}, expected floats of 16 bits or more")
    if problems:
        raise CheckpointError("the weights do not fit the model: " + "; ".join(problems))


def _check_experts(state, tensors: list[Tensor]) -> None:
    """Refuses routers to another number of experts, before every expert is listed as missing."""
    for t in tensors:
        if t.specs[0].role != "router" or t.name not in state or len(state[t.name].shape) != 2:
            continue
        there, here = state[t.name].shape[0], t.their_shape[0]
        if there != here:
            raise CheckpointError(
                f"the checkpoint has {there} experts ({t.name}), the model {here}: set the "
                "number of experts to the checkpoint's"
            )


def _same_as_embedding(state) -> bool:
    embedding = state.get("model.embed_tokens.weight")
    return embedding is not None and np.array_equal(
        np.asarray(state["lm_head.weight"]), np.asarray(embedding)
    )


def _float_view(stored: Any, tensor: Tensor) -> np.ndarray:
    """The tensor with each of our axes for itself, of a type that devices have."""
    w = np.asarray(stored)
    if w.dtype == np.float64:  # which a device would narrow without a word
        with np.errstate(over="ignore"):
            narrow = w.astype(np.float32)
        if not np.array_equal(np.isfinite(narrow), np.isfinite(w)):
            raise CheckpointError(
                f"{tensor.name} has float64 values that are too large for float32"
            )
        w = narrow
    return w.reshape(tensor.apart)


class _Leaf:
    """One parameter while it is filled: this process's shards of it, each on its device."""

    def __init__(self, spec: ParamSpec, sharding: Sharding):
        self.spec = spec
        self.sharding = sharding.named(spec.axes, spec.shape)
        self.shards = [
            _Shard(device, [s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True)], spec)
            for device, index in self.sharding.addressable_devices_indices_map(spec.shape).items()
            if index is not None  # never of a device of one's own
        ]

    def fill(self, tensor: Tensor, order: np.ndarray, view: np.ndarray) -> None:
        """Writes the leaf's part of one tensor to the devices whose shards it belongs to.

        Args:
          order: which of the tensor's joined coordinates are those of the leaf's last axis.
          view: the tensor with the axes of ``Tensor.apart``.
        """
        stacked = len(tensor.place)
        for shard in self.shards:
            lead, rest = shard.bounds[:stacked], shard.bounds[stacked:]
            if any(not a <= i < b for i, (a, b) in zip(tensor.place, lead, strict=True)):
                continue
            wanted = order[slice(*rest[-1])]
            first = int(wanted.min())
            rest = [*rest[:-1], (first, int(wanted.max()) + 1)]
            part = view[tuple(slice(*rest[axis]) for axis in tensor.axes)]
            coordinates = tuple((wanted - first).tolist())
            in_order = coordinates == tuple(range(len(coordinates)))
            place = [i - a for i, (a, _) in zip(tensor.place, lead, strict=True)]
            if not shard.write(part, place, tensor.axes, None if in_order else coordinates):
                raise CheckpointError(f"{tensor.name} holds NaN or infinite values")

    def array(self) -> jax.Array:
        shards = [jax.device_put(shard.array, shard.device) for shard in self.shards]
        return jax.make_array_from_single_device_arrays(self.spec.shape, self.sharding, shards)


class _Shard:
    """One device's part of a parameter, within ``bounds`` of every axis.

    A CPU's memory is the host's, where NumPy writes in place without a compilation.
    """

    def __init__(self, device: jax.Device, bounds: list[tuple[int, int]], spec: ParamSpec):
        self.device, self.bounds = device, bounds
        shape = tuple(stop - start for start, stop in bounds)
        self.on_host = _on_host(device)
        self.array: Any = (
            _aligned(shape, np.dtype(spec.dtype))
            if self.on_host
            else jnp.zeros(shape, spec.dtype, device=device)
        )

    def write(self, part: np.ndarray, place: list[int], axes, order) -> bool:
        """Puts ``part``, turned to our axes, at a place on the leading ones; is all of it finite?

        Waits for it, so that the host need not hold the next tensor as well.
        """
        if self.on_host:
            ours, finite = _turn(np, part, axes, order)
            self.array[tuple(place)] = ours
            return bool(finite)
        start = np.asarray(place + [0] * (self.array.ndim - len(place)), np.int32)
        part = jax.device_put(part, self.device)
        self.array, finite = _write_there(self.array, part, start, axes=axes, order=order)
        return bool(finite)


def _on_host(device: jax.Device) -> bool:
    return device.platform == "cpu"


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it is; what is not aligned it would copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


_ALIGNMENT = 64  # bytes


def _turn(xp, part, axes, order):
    """(``part`` with our order of axes and coordinates, whether all of it is finite)."""
    ours = xp.transpose(part, np.argsort(axes))
    if order is not None:
        ours = ours[..., np.asarray(order)]
    return ours, xp.isfinite(part).all()


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("axes", "order"))
def _write_there(shard, part, start, *, axes, order):
    ours, finite = _turn(jnp, part, axes, order)
    ours = ours.astype(shard.dtype).reshape((1,) * (shard.ndim - ours.ndim) + ours.shape)
    return jax.lax.dynamic_update_slice(shard, ours, start), finite
