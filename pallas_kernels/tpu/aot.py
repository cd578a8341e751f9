"""The TPU kernels compiled for a chip, with no TPU at hand (ahead of time; needs libtpu).

Shape suffixes: B batch, K key heads, G query heads of one key head, T tokens, H width of a head;
M rows, E groups, D, F widths; N tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.tpu import block_sizes
from pallas_kernels.tpu.attention import attention
from pallas_kernels.tpu.cross_entropy import cross_entropy
from pallas_kernels.tpu.grouped_matmul import grouped_matmul
from pallas_kernels.tpu.visits import Pattern

#: chip -> smallest topology to compile for
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
#: what libtpu wants to know where there is no TPU
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def device(chip: str) -> jax.Device:
    """One of the chip, which is not there."""
    name = TOPOLOGIES[chip]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]


def _mesh(chip: str) -> Mesh:
    return Mesh(np.array([device(chip)]), ("x",))


@contextlib.contextmanager
def arrays(chip: str):
    """``array(dtype, *shape)`` of one device of the chip, which lowering is told of."""
    mesh = _mesh(chip)
    place = NamedSharding(mesh, PartitionSpec())

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield array


def compile_attention(chip, heads, tokens, width, sizes=None, backward=True, packed=False):
    """The compiled (q, k, v, do, positions, segments) -> output and gradients, in bfloat16.

    One row of ``heads`` query heads on one key head; causal and in order. ``sizes``: entries of
    ``block_sizes.json`` to use instead of the table's.
    """
    if sizes is not None:
        block_sizes.table()[chip].update(sizes)

    def step(q, k, v, do, positions, segments):
        def forward(q, k, v):
            documents = (segments, segments) if packed else (None, None)
            return attention(
                q,
                k,
                v,
                positions,
                positions,
                *documents,
                pattern=Pattern(in_order=True),
                scale=width**-0.5,
                chip=chip,
            )[0]

        if not backward:
            return forward(q, k, v)
        o, back = jax.vjp(forward, q, k, v)
        return o, back(do)

    with arrays(chip) as array:
        q_BKGTH = array("bfloat16", 1, 1, heads, tokens, width)
        k_BKTH = array("bfloat16", 1, 1, tokens, width)
        i_BT = array("int32", 1, tokens)
        return jax.jit(step).lower(q_BKGTH, k_BKTH, k_BKTH, q_BKGTH, i_BT, i_BT).compile()


def compile_grouped_matmul(chip, rows, width, result, groups):
    """The compiled (x, w, sizes, dy) -> result and gradients of both, in bfloat16."""

    def step(x_MD, w_EDF, sizes_E, dy_MF):
        y_MF, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E, chip=chip), x_MD, w_EDF)
        return y_MF, back(dy_MF)

    with arrays(chip) as array:
        return (
            jax.jit(step)
            .lower(
                array("bfloat16", rows, width),
                array("bfloat16", groups, width, result),
                array("int32", groups),
                array("bfloat16", rows, result),
            )
            .compile()
        )


def compile_cross_entropy(chip, tokens, width, vocabulary):
    """The compiled (x, w, target, weight) -> loss and gradients; x in bfloat16, w in float32."""

    def step(x_ND, w_DV, target_N, weight_N):
        def loss(x_ND, w_DV):
            return cross_entropy(x_ND, w_DV, target_N, weight_N, 0.0, chip=chip)[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(x_ND, w_DV)

    with arrays(chip) as array:
        return (
            jax.jit(step)
            .lower(
                array("bfloat16", tokens, width),
                array("float32", width, vocabulary),
                array("int32", tokens),
                array("float32", tokens),
            )
            .compile()
        )


#: family of kernels -> what compiles it
COMPILE = {
    "attention": compile_attention,
    "grouped_matmul": compile_grouped_matmul,
    "cross_entropy": compile_cross_entropy,
}


def temporaries(compiled) -> int:
    """Bytes of the program's temporaries in HBM."""
    return compiled.memory_analysis().temp_size_in_bytes
