"""Collectives read from compiled programs, that are known by construction."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from train.planning import hlo

_P = jax.sharding.PartitionSpec


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2, 4), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)


def _collectives(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = jax.jit(function).lower(*arguments).compile()
  return hlo.collectives(compiled.as_text())


def _facts(found):
  return [(c.kind, c.dtype, c.shape, c.group, c.times) for c in found]


def test_each_kind_has_its_shape_group_and_bytes(mesh):
  # Each chip has the whole array, as nothing is split on the way in.
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=_P(), out_specs=_P(), check_vma=False
  )
  def all_kinds(x):
    ring = [(i, (i + 1) % 4) for i in range(4)]
    with jax.named_scope("here"):
      total = lax.psum(x, "x")
    return (
      total,
      lax.psum(x.astype(jnp.int32), ("x", "y")),
      lax.all_gather(x, "y"),
      lax.psum_scatter(x, "y", tiled=True),
      lax.all_to_all(x, "y", 0, 1, tiled=True),
      lax.ppermute(x, "y", ring),
    )

  collectives = _collectives(all_kinds, (8, 12))
  assert all(c.times == 1 for c in collectives)
  found = {(c.kind, c.dtype): c for c in collectives}
  assert {of: c.group for of, c in found.items()} == {
    ("all-reduce", "f32"): 2,
    ("all-reduce", "s32"): 8,
    ("all-gather", "f32"): 4,
    ("reduce-scatter", "f32"): 4,
    ("all-to-all", "f32"): 4,
    ("collective-permute", "f32"): 8,
  }
  size = 8 * 12 * 4
  assert hlo.bytes_by_kind(collectives) == {
    "all-reduce": size + 2 * size * 7 // 8,
    "all-gather": 3 * size,
    "reduce-scatter": size * 3 // 4,
    "all-to-all": size * 3 // 4,  # four arrays, one for each chip
    "collective-permute": size,
  }
  assert found["all-reduce", "f32"].shape == (8, 12)
  assert found["reduce-scatter", "f32"].shape == (2, 12)
  assert "/here/" in found["all-reduce", "f32"].op_name


def test_a_contraction_over_a_sharded_axis_adds_up_the_result(mesh):
  def sharded(*names):
    return jax.sharding.NamedSharding(mesh, _P(*names))

  compiled = (
    jax.jit(jnp.matmul, out_shardings=sharded())
    .lower(
      jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=sharded(None, "y")),
      jax.ShapeDtypeStruct((32, 24), jnp.float32, sharding=sharded("y")),
    )
    .compile()
  )
  found = hlo.collectives(compiled.as_text())
  assert _facts(found) == [("all-reduce", "f32", (16, 24), 4, 1)]


def test_what_is_in_a_loop_counts_as_often_as_it_runs(mesh):
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=_P(), out_specs=_P(), check_vma=False
  )
  def loops(x):
    def inner(x, _):
      return jnp.sin(lax.psum(x, "x")), None

    def outer(x, _):
      x, _ = lax.scan(inner, x, length=3)
      return jnp.sin(lax.psum(x, "y")), None

    x, _ = lax.scan(outer, x, length=5)
    return lax.psum(x, ("x", "y"))

  found = _collectives(loops, (6,))
  assert sorted(_facts(found), key=lambda x: x[-1]) == [
    ("all-reduce", "f32", (6,), 8, 1),
    ("all-reduce", "f32", (6,), 4, 5),
    ("all-reduce", "f32", (6,), 2, 15),
  ]
  assert hlo.bytes_by_kind(found) == dict.fromkeys(hlo.KINDS, 0) | {
    "all-reduce": 42 + 5 * 36 + 15 * 24
  }


def test_of_a_loop_whose_length_depends_on_data_it_is_not_known(mesh):
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=_P(), out_specs=_P(), check_vma=False
  )
  def until_large(x):
    return lax.while_loop(
      lambda x: jnp.max(x) < 100, lambda x: lax.psum(x, "x"), x
    )

  found = _collectives(until_large, (6,))
  assert _facts(found) == [("all-reduce", "f32", (6,), 2, None)]
  assert hlo.bytes_by_kind(found)["all-reduce"] == 24


# As compilers for GPUs and TPUs write them; that for CPUs has none of these.
_ASYNCHRONOUS = """\
HloModule jit_f, is_scheduled=true, num_partitions=16

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%exchange (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %scattered = f32[2,4]{1,0} reduce-scatter(%p), replica_groups=[4,4]<=[16], dimensions={0}, to_apply=%add
}

%beginning (p: bf16[1,4]) -> (bf16[1,4], bf16[16,4]) {
  %p.1 = bf16[1,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gathered.1 = bf16[16,4]{1,0:T(8,128)(2,1)} all-gather(%p.1), replica_groups=mesh['a'=16,'b'=1] {'a'}, dimensions={0}, frontend_attributes={chain_id="0"}, metadata={op_name="first"}
  ROOT %begun = (bf16[1,4]{1,0}, bf16[16,4]{1,0}) custom-call(%gathered.1), custom_call_target="AsyncCollectiveStart"
}

%middle (p: bf16[1,4], q: bf16[16,4]) -> bf16[16,4] {
  %p.2 = bf16[1,4]{1,0} parameter(0)
  %q.2 = bf16[16,4]{1,0} parameter(1)
  %gathered.2 = bf16[16,4]{1,0} all-gather(%p.2), replica_groups=mesh['a'=16,'b'=1] {'a'}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %done = bf16[16,4]{1,0} custom-call(%p.2, %q.2, %gathered.2), custom_call_target="AsyncCollectiveDone"
}

%turn (carry: (s32[], f32[6])) -> (s32[], f32[6]) {
  %carry = (s32[]{:T(128)}, f32[6]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %i.copy = s32[] copy(%i)
  %v = f32[6]{0} get-tuple-element(%carry), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i.copy, %two)
  %start = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%v), source_target_pairs={{0,1},{1,0}}, metadata={op_name="turn"}
  %end = f32[6]{0} collective-permute-done(%start)
  ROOT %carried = (s32[], f32[6]{0}) tuple(%next, %end)
}

%more (carry.1: (s32[], f32[6])) -> pred[] {
  %carry.1 = (s32[], f32[6]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %nine = s32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %nine), direction=LT
}

ENTRY %main (a: f32[6], b: bf16[1,4], c: f32[8,4]) -> f32[6] {
  %a = f32[6]{0} parameter(0)
  %b = bf16[1,4]{1,0} parameter(1)
  %c = f32[8,4]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %both-start = (f32[6]{0}, f32[3]{0}) all-reduce-start(%a, %zero), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %both = (f32[6]{0}, f32[3]{0}) all-reduce-done(%both-start)
  %other-start = ((f32[8,4]), f32[2,4]) async-start(%c), calls=%exchange
  %other-update = ((f32[8,4]), f32[2,4]) async-update(%other-start), calls=%exchange
  %other = f32[2,4]{1,0} async-done(%other-update), calls=%exchange
  %g1 = (bf16[1,4]{1,0}, bf16[16,4]{1,0}) fusion(%b), kind=kCustom, calls=%beginning
  %g2 = bf16[16,4]{1,0} get-tuple-element(%g1), index=1
  %g3 = bf16[16,4]{1,0} fusion(%b, %g2), kind=kCustom, calls=%middle
  %begin = (s32[], f32[6]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[6]{0}) while(%begin), condition=%more, body=%turn
  ROOT %out = f32[6]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_what_starts_and_ends_counts_once():
  found = hlo.collectives(_ASYNCHRONOUS)
  assert _facts(found) == [
    ("all-reduce", "f32", (6,), 4, 1),
    ("all-reduce", "f32", (3,), 4, 1),
    ("reduce-scatter", "f32", (2, 4), 4, 1),
    ("all-gather", "bf16", (16, 4), 16, 1),
    # Of i = 0, 2, 4, 6 and 8; that it is not stated is a TPU's way.
    ("collective-permute", "f32", (6,), 16, 5),
  ]
  assert [c.op_name for c in found] == ["", "", "", "first", "turn"]


def test_a_program_on_one_device_communicates_nothing():
  assert _collectives(jnp.sin, (3,)) == []


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match=r"has an ENTRY; got 'nothing'\.$"):
    hlo.collectives("nothing")
