"""The walk over the layers of a trunk, which everything that looks at them uses."""

from __future__ import annotations

from dataclasses import replace

import jax

from step_jax.core.spec import is_spec, path_name
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.positions import Rope
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.video.dit import VideoDiT
from tests.models import small

A, B, C = (Block(small.KINDS[kind], small.MLP) for kind in ("mha", "gqa", "mla"))
DECODER = Decoder(small.WIDTH, (Group(1, (C,)), Group(3, (A, B)), Group(4, (A,))), small.VOCAB)


def test_the_walk_says_where_every_stack_stands():
    stacks = list(DECODER.trunk.walk())
    assert [s.path for s in stacks] == ["groups/0/0", "groups/1/0", "groups/1/1", "groups/2/0"]
    assert [s.block for s in stacks] == [C, A, B, A]
    assert [(s.first, s.stride, s.repeat) for s in stacks] == [
        (0, 1, 1), (1, 2, 3), (2, 2, 3), (7, 1, 4)
    ]  # fmt: skip
    assert [s.of("a bc d".split()) for s in stacks] == ["a", "b", "c", "d"]


def test_layers_come_in_the_order_in_which_they_run():
    layers = DECODER.trunk.layers()
    assert [stack.layer(n) for stack, n in layers] == list(range(DECODER.trunk.depth))
    assert [stack.block for stack, _ in layers] == [C, A, B, A, B, A, B, A, A, A, A]
    assert DECODER.trunk.largest_repeat == 3  # six layers, of which three turns are cut


def test_the_paths_of_the_walk_are_those_of_the_parameters():
    leaves = jax.tree_util.tree_leaves_with_path(DECODER.specs(), is_leaf=is_spec)
    names = [path_name(path) for path, _ in leaves]
    inner = {n.rsplit("/", 1)[0] for n in names if n.endswith("/attention_norm_D")}
    assert inner == {stack.path for stack in DECODER.trunk.walk()}


def test_a_changed_model_has_a_trunk_of_its_own():
    first = DECODER.trunk
    wider = replace(DECODER, width=64)
    assert wider.trunk.width == 64 and DECODER.trunk is first and wider != DECODER
    assert replace(wider, width=small.WIDTH) == DECODER
    assert hash(replace(wider, width=small.WIDTH)) == hash(DECODER)


def test_a_diffusion_transformers_layers_are_one_stack():
    c = VideoDiT(32, 3, MHA(4, 8, position=Rope(axes=(4, 2, 2))), GELU(48), channels=4)
    (stack,) = c.trunk.walk()
    assert (stack.repeat, stack.first, stack.stride) == (3, 0, 1)
    assert c.specs().blocks.modulation_MD.shape == (3, 6, 32)
