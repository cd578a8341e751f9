"""Counting in compiled programs, against programs whose counts are known by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from step_jax.planning import collectives, hlo, operations

SHAPE = {"data": 2, "tensor": 4}


def counted(f, *args, **options):
    compiled = jax.jit(f, **options).lower(*args).compile()
    module = hlo.parse(compiled.as_text())
    executions, endless = hlo.executions(module)
    return module, executions, endless


def flops(f, *args) -> float:
    module, executions, endless = counted(f, *args)
    assert not endless
    return operations.count(module, executions).flops


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_is_two_operations_for_each_multiply_add():
    assert flops(jnp.matmul, f32(8, 32), f32(32, 16)) == 2 * 8 * 32 * 16
    batched = flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), f32(3, 8, 32), f32(3, 32, 16))
    assert batched == 3 * 2 * 8 * 32 * 16


def test_a_loop_counts_every_turn_and_nested_loops_multiply():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def once(x, ws):
        return jax.lax.scan(inner, x, ws)[0]

    def twice(x, ws):
        return jax.lax.scan(lambda x, _: (once(x, ws), None), x, None, length=5)[0]

    one = 2 * 8 * 64 * 64
    assert flops(once, f32(8, 64), f32(7, 64, 64)) == 7 * one
    assert flops(twice, f32(8, 64), f32(7, 64, 64)) == 5 * 7 * one


def test_gradient_of_a_loop_is_three_times_forward_and_remat_adds_one():
    def loss(w, x, wrap):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(wrap(layer), x, w)[0])

    args = (f32(6, 64, 64), f32(8, 64))
    one = 6 * 2 * 8 * 64 * 64
    grad = jax.grad(loss, argnums=(0, 1))
    assert flops(lambda w, x: grad(w, x, lambda f: f), *args) == 3 * one
    remat = flops(lambda w, x: grad(w, x, jax.checkpoint), *args)
    assert 3 * one <= remat <= 4 * one


def test_convolution_counts_neither_padding_nor_holes():
    def full(x, k):
        return jax.lax.conv_general_dilated(x, k, (1,), "VALID")

    assert flops(full, f32(2, 3, 10), f32(5, 3, 4)) == 2 * 2 * 5 * 3 * 7 * 4
    # size 4 in 4 out with one pad each side: places see 2, 3, 3, 2 elements
    same = operations._valid_positions(4, 3, 4, 1, (1, 1), 1, 1)
    assert same == 2 + 3 + 3 + 2
    # batched products on TPU: dilation and stride meet one element each
    assert operations._valid_positions(32, 32, 32, 31, (0, 0), 32, 1) == 32


def test_unknown_loop_is_named_and_counted_once():
    def f(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e9, lambda x: x @ x, x)

    module, executions, endless = counted(f, f32(16, 16))
    assert len(endless) == 1
    assert operations.count(module, executions).flops == 2 * 16**3


def test_counter_against_a_constant_is_a_known_loop():
    """The TPU compiler does not write trip counts down."""
    text = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %one = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} copy(%p#0)
  %next = s32[] add(%i, %one)
  %dot = f32[8,8]{1,0} dot(%p#1, %p#1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%next, %dot)
}

%condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %limit = s32[] constant(11)
  ROOT %less = pred[] compare(%p#0, %limit), direction=LT
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0), metadata={op_name="x"}
  %zero = s32[] constant(1)
  %start = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""
    module = hlo.parse(text)
    executions, endless = hlo.executions(module)
    assert not endless and executions["body"] == 4  # 1, 4, 7, 10
    assert operations.count(module, executions).flops == 4 * 2 * 8**3


def test_kernel_says_what_it_costs_or_is_named():
    line = '"cost_estimate":{"flops":"123000","transcendentals":"0","bytes_accessed":"1"}'
    call = hlo.Instruction("k", "f32[8]{0}", "custom-call", "", line, True)
    assert operations.kernel_flops(call) == 123000
    call = hlo.Instruction("k", "f32[8]{0}", "custom-call", "", "", True)
    assert operations.kernel_flops(call) is None


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no HLO"):
        hlo.parse("hello")


def test_stacked_layers_are_read_a_slice_at_a_time():
    def f(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    module, executions, _ = counted(f, f32(8, 128), f32(16, 128, 128))
    traffic = operations.count(module, executions).traffic
    stack = 16 * 128 * 128 * 4
    assert stack <= traffic < 4 * stack  # whole stacks in each turn would be 16 times that


def test_slice_inside_a_fusion_of_a_fusion_is_read_alone():
    text = """HloModule m

%slice (ws: f32[16,8,8], n: s32[]) -> f32[1,8,8] {
  %ws = f32[16,8,8]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %w = f32[1,8,8]{2,1,0} dynamic-slice(%ws, %n, %n, %n), dynamic_slice_sizes={1,8,8}
}

%outer (ws: f32[16,8,8], n: s32[], x: f32[1,8,8]) -> f32[1,8,8] {
  %ws = f32[16,8,8]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = f32[1,8,8]{2,1,0} parameter(2)
  %w = f32[1,8,8]{2,1,0} fusion(%ws, %n), kind=kLoop, calls=%slice
  ROOT %y = f32[1,8,8]{2,1,0} add(%w, %x)
}

ENTRY %main (ws: f32[16,8,8], n: s32[], x: f32[1,8,8]) -> f32[1,8,8] {
  %ws = f32[16,8,8]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = f32[1,8,8]{2,1,0} parameter(2)
  ROOT %y = f32[1,8,8]{2,1,0} fusion(%ws, %n, %x), kind=kOutput, calls=%outer
}
"""
    module = hlo.parse(text)
    traffic = operations.count(module, {"main": 1.0}).traffic
    assert traffic == pytest.approx(3 * 8 * 8 * 4, abs=16)  # indices are read as well


LAID_OUT = """HloModule m

%copy_fusion (ws: bf16[16,8,8]) -> bf16[16,8,8] {
  %ws = bf16[16,8,8]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %copy = bf16[16,8,8]{2,1,0:T(8,128)(2,1)} copy(%ws)
}

%read (ws: bf16[16,8,8], n: s32[]) -> bf16[1,8,8] {
  %ws = bf16[16,8,8]{2,1,0:T(16,128)(2,1)} parameter(0)
  %laid = bf16[16,8,8]{2,1,0:T(8,128)(2,1)} fusion(%ws), kind=kLoop, calls=%copy_fusion
  %n = s32[] parameter(1)
  %w = bf16[1,8,8]{2,1,0} dynamic-slice(%laid, %n, %n, %n), dynamic_slice_sizes={1,8,8}
  ROOT %copy = bf16[1,8,8]{2,1,0:T(16,128)(2,1)} copy(%w)
}

%write (ws: bf16[16,8,8], n: s32[], w: bf16[1,8,8]) -> bf16[16,8,8] {
  %ws = bf16[16,8,8]{2,1,0:T(16,128)(2,1)} parameter(0)
  %laid = bf16[16,8,8]{2,1,0:T(8,128)(2,1)} fusion(%ws), kind=kLoop, calls=%copy_fusion
  %n = s32[] parameter(1)
  %w = bf16[1,8,8]{2,1,0:T(8,128)(2,1)} parameter(2)
  ROOT %out = bf16[16,8,8]{2,1,0:T(16,128)(2,1)} dynamic-update-slice(%laid, %w, %n, %n, %n)
}

ENTRY %main (ws: bf16[16,8,8], n: s32[]) -> bf16[16,8,8] {
  %ws = bf16[16,8,8]{2,1,0:T(16,128)(2,1)} parameter(0)
  %n = s32[] parameter(1)
  %w = bf16[1,8,8]{2,1,0:T(16,128)(2,1)} fusion(%ws, %n), kind=kLoop, calls=%read
  ROOT %out = bf16[16,8,8]{2,1,0:T(16,128)(2,1)} fusion(%ws, %n, %w), kind=kLoop, calls=%write
}
"""


def test_another_layout_before_a_slice_or_an_update_does_not_read_the_whole_stack():
    """TPU7x: fusions of a copy, as its compiler writes them around stacks of layers."""
    module = hlo.parse(LAID_OUT)
    one = 8 * 8 * 2
    traffic = operations.count(module, {"main": 1.0}).traffic
    assert traffic == pytest.approx(4 * one, abs=16)  # read and written, twice; and indices


# --- Layers -------------------------------------------------------------------------------------


def test_work_is_sorted_by_the_files_that_it_was_traced_in():
    text = """HloModule m

FileNames
1 "/x/step_jax/trainers/text.py"
2 "/x/step_jax/models/layers/moe.py"
3 "/x/step_jax/models/layers/mlp.py"
4 "/x/step_jax/ops/attention.py"
5 "/x/optax/transform.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
2 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
3 {file_name_id=3 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
4 {file_name_id=4 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
5 {file_name_id=5 function_name_id=1 line=1 end_line=1 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=2}
5 {file_location_id=5 parent_frame_id=2}


ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %a = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, metadata={op_name="a" stack_frame_id=2}
  %b = f32[8,8]{1,0} dot(%a, %x), lhs_contracting_dims={1}, metadata={op_name="b" stack_frame_id=3}
  %c = f32[8,8]{1,0} dot(%b, %x), lhs_contracting_dims={1}, metadata={op_name="c" stack_frame_id=4}
  %d = f32[8,8]{1,0} add(%c, %x), metadata={op_name="d" stack_frame_id=5}
  ROOT %e = f32[8,8]{1,0} dot(%d, %x), lhs_contracting_dims={1}
}
"""
    module = hlo.parse(text)
    assert module.files(module.computations["main"].instructions["b"]) == (
        "/x/step_jax/models/layers/mlp.py",
        "/x/step_jax/models/layers/moe.py",
        "/x/step_jax/trainers/text.py",
    )
    once, moved = 2 * 8**3, 3 * 8 * 8 * 4
    assert operations.count(module, {"main": 2.0}).work == {
        ("experts", "dense"): 2 * once,
        ("mlp", "dense"): 2 * once,  # the innermost file decides
        ("attention", "attention"): 2 * once,
        ("optimizer", "optimizer"): 2 * moved,
        ("rest", "dense"): 2 * once,
    }


# --- Collectives --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), tuple(SHAPE), axis_types=(AxisType.Auto,) * 2)


def sent(mesh, f, *args, out=None):
    module, executions, _ = counted(f, *args, out_shardings=NamedSharding(mesh, out or P()))
    return {
        (c.kind, c.axes): (c.calls, c.nbytes)
        for c in collectives.communication(module, executions, SHAPE)
    }


def laid(mesh, spec, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


def test_gathering_sends_the_piece_to_all_others(mesh):
    whole = 64 * 32 * 4
    found = sent(mesh, lambda x: x + 1, laid(mesh, P("tensor"), 64, 32))
    assert found == {("all-gather", "tensor"): (1, whole / 4 * 3)}
    found = sent(mesh, lambda x: x + 1, laid(mesh, P("data"), 64, 32))
    assert found == {("all-gather", "data"): (1, whole / 2)}


def test_summing_sends_twice_all_but_the_own_part(mesh):
    args = laid(mesh, P(None, "tensor"), 16, 64), laid(mesh, P("tensor"), 64, 32)
    found = sent(mesh, jnp.matmul, *args)
    assert found == {("all-reduce", "tensor"): (1, 2 * 16 * 32 * 4 * 3 / 4)}


def test_collectives_of_a_loop_count_every_turn(mesh):
    def f(x, ws):
        def layer(x, w):
            y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("data")))
            return y, None

        return jax.lax.scan(layer, x, ws)[0]

    args = laid(mesh, P("data"), 16, 32), laid(mesh, P(None, "tensor"), 6, 32, 32)
    found = sent(mesh, f, *args, out=P("data"))
    assert sum(calls for calls, _ in found.values()) >= 6
    assert all(axes == "tensor" for _, axes in found)


def test_both_axes_and_permutes(mesh):
    found = sent(mesh, lambda x: x + 1, laid(mesh, P(("data", "tensor")), 64, 32))
    assert sum(nbytes for _, nbytes in found.values()) == 64 * 32 * 4 / 8 * 7
    around = [(i, (i + 1) % 4) for i in range(4)]
    shift = jax.shard_map(
        lambda x: jax.lax.ppermute(x, "tensor", around),
        mesh=mesh,
        in_specs=P("tensor"),
        out_specs=P("tensor"),
    )
    found = sent(mesh, shift, laid(mesh, P("tensor"), 64, 32), out=P("tensor"))
    assert found == {("collective-permute", "tensor"): (1, 16 * 32 * 4)}


@pytest.mark.parametrize(
    "text,axes",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "tensor"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("replica_groups=[2,4]<=[8]", "tensor"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups=[1,8]<=[8]", "data+tensor"),
        ("replica_groups={}", "data+tensor"),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "part of tensor"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", "data"),
        ("replica_groups=mesh['a'=8] {'a'}, use_global_device_ids=true", "data+tensor"),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", "tensor"),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", "data"),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c'}", "part of tensor"),
    ],
)
def test_notations_of_replica_groups(text, axes):
    groups = collectives.replica_groups(f", channel_id=1, {text}, dimensions={{0}}", 8)
    assert collectives.axes_of(groups, SHAPE) == axes


def test_what_crosses_slices_is_a_send_to_the_host():
    text = """HloModule m

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %after = token[] after-all()
  ROOT %s = (f32[64]{0}, u32[], token[]) send(%x, %after), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    module = hlo.parse(text)
    found = collectives.communication(module, {"main": 3.0}, SHAPE, ("data", 2))
    assert found == [collectives.Traffic("all-reduce", "data between slices", 3.0, 3 * 256)]


def test_exchange_of_experts_counts_the_rows_of_an_even_load():
    """Four shards of a buffer with room for 64 rows get the 16 that each device sends out."""
    text = """HloModule m

ENTRY %main (x: bf16[16,8], room: bf16[64,8], o: s32[4]) -> bf16[16,8] {
  %x = bf16[16,8]{1,0} parameter(0)
  %room = bf16[64,8]{1,0} parameter(1)
  %o = s32[4]{0} parameter(2)
  %there = bf16[64,8]{1,0} ragged-all-to-all(%x, %room, %o, %o, %o, %o), \
replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %back = bf16[16,8]{1,0} ragged-all-to-all(%there, %x, %o, %o, %o, %o), \
replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""
    (found,) = collectives.communication(hlo.parse(text), {"main": 1.0}, SHAPE)
    rows = 16 * 3 / 4  # a quarter stays
    assert found == collectives.Traffic("ragged-all-to-all", "tensor", 2.0, 2 * rows * 8 * 2)


def test_collective_spread_over_fusions_counts_once():
    gather = (
        "f32[8,64]{1,0} all-gather(%a), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, "
        'frontend_attributes={chain_id="3"}'
    )
    text = f"""HloModule m, is_scheduled=true

%begin (a: f32[2,64]) -> (f32[2,64], f32[8,64]) {{
  %a = f32[2,64]{{1,0}} parameter(0)
  %all-gather.1 = {gather}
  ROOT %c = (f32[2,64]{{1,0}}, f32[8,64]{{1,0}}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}}

%beside (a: f32[2,64], b: f32[8,64], x: f32[4,4]) -> (f32[4,4], f32[2,64], f32[8,64]) {{
  %a = f32[2,64]{{1,0}} parameter(0)
  %b = f32[8,64]{{1,0}} parameter(1)
  %x = f32[4,4]{{1,0}} parameter(2)
  %dot = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %all-gather.2 = {gather}
  ROOT %t = (f32[4,4]{{1,0}}, f32[2,64]{{1,0}}, f32[8,64]{{1,0}}) tuple(%dot, %a, %all-gather.2)
}}

%end (a: f32[2,64], b: f32[8,64]) -> f32[8,64] {{
  %a = f32[2,64]{{1,0}} parameter(0)
  %b = f32[8,64]{{1,0}} parameter(1)
  %all-gather.3 = {gather}
  ROOT %d = f32[8,64]{{1,0}} custom-call(%a, %b, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (a: f32[2,64], x: f32[4,4]) -> f32[8,64] {{
  %a = f32[2,64]{{1,0}} parameter(0)
  %x = f32[4,4]{{1,0}} parameter(1)
  %s = (f32[2,64]{{1,0}}, f32[8,64]{{1,0}}) fusion(%a), kind=kCustom, calls=%begin
  %m = (f32[4,4]{{1,0}}, f32[2,64]{{1,0}}, f32[8,64]{{1,0}}) fusion(%s#0, %s#1, %x), kind=kOutput, \
calls=%beside
  ROOT %r = f32[8,64]{{1,0}} fusion(%m#1, %m#2), kind=kCustom, calls=%end
}}
"""
    module = hlo.parse(text)
    executions, _ = hlo.executions(module)
    piece = 2 * 64 * 4
    (found,) = collectives.communication(module, executions, SHAPE)
    assert found == collectives.Traffic("all-gather", "tensor", 1.0, 3 * piece)
    # the piece is read and the whole written, the product reads and writes 4 x 4
    counts = operations.count(module, executions)
    assert counts.traffic == piece + 4 * piece + 2 * 4 * 4 * 4
    assert counts.flops == 2 * 4**3


def test_unknown_notation_is_refused():
    with pytest.raises(ValueError, match="unknown notation"):
        collectives.replica_groups("replica_groups=@7", 8)
