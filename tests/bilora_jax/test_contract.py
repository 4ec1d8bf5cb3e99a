"""Optax's checklist for transformations, on each of the library's."""

import dataclasses
import inspect
import re
from typing import Any

from flax import serialization
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilora_jax
from bilora_jax import (
  Factors,
  Layout,
  adapters,
  baselines,
  bilora,
  hold_ball,
  joined,
  keep_in_ball,
  variants,
)

_RNG = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(_RNG.normal(size=shape), jnp.float32)


PAIR = Factors(normal(4, 2), normal(2, 3), 2.0)
PARTS = {
  "primary": {"w": PAIR},
  "auxiliary": {"w": Factors(normal(4, 2), normal(2, 3), 0.5)},
  "extra": {"bias": normal(3)},
}
KINDS = {
  "loha": adapters.LoHa(*(normal(*x) for x in ((4, 2), (2, 3)) * 2), 0.5),
  "lokr": adapters.LoKr(normal(2, 1), normal(2, 2), normal(2, 3), 2.0),
  "vera": adapters.VeRA(normal(2), normal(3), normal(4, 2), normal(2, 3)),
  "ia3": adapters.IA3(normal(3), jnp.ones(3), 4),
  "prompt": adapters.SoftPrompt(normal(2, 4)),
  "bottleneck": adapters.Bottleneck(
    normal(4, 2), normal(2), normal(2, 4), normal(4)
  ),
}
HOST = {"w": {"lora_a": normal(4, 4), "lora_b": normal(4, 3)}, "v": normal(3)}
LAYOUT = Layout("lora_a", "lora_b", 1.0)
ADAM = optax.adam(0.1)

# Transformations, and what each is of.
TRANSFORMATIONS: dict[str, tuple[Any, Any]] = {
  "bilora": (bilora(ADAM), PARTS),
  "bilora of all kinds": (bilora(ADAM), {"primary": KINDS, "auxiliary": KINDS}),
  "keep_in_ball": (keep_in_ball(0.05), {**KINDS, "w": PAIR}),
  "hold_ball": (hold_ball(optax.chain(bilora(ADAM), optax.ema(0.9))), PARTS),
  "joined": (joined(bilora(ADAM), LAYOUT, 2), HOST),
  "without_held": (adapters.without_held(ADAM), KINDS),
  "rescale_moments": (variants.rescale_moments(bilora(ADAM)), PARTS),
  "adaptive_radius": (variants.adaptive_radius(bilora(ADAM), 0.1), PARTS),
  "power_ascent": (bilora(ADAM, 0.05, variants.power_ascent()), PARTS),
  "redraw_a": (
    variants.redraw_a(bilora(ADAM), every=2),
    variants.orthonormal_a(jax.random.key(0), PARTS),
  ),
  "shared_a": (variants.shared_a(ADAM), variants.share_a(PARTS)),
  "balanced": (baselines.balanced(ADAM, 0.01, by="factors"), PARTS),
  "lora_plus": (baselines.lora_plus(ADAM, 4.0), PARTS),
}
WITH_A_BALL = {
  *("bilora", "hold_ball", "joined", "rescale_moments", "adaptive_radius"),
  *("power_ascent", "redraw_a", "shared_a", "bilora of all kinds"),
  "keep_in_ball",
}


@pytest.fixture(params=TRANSFORMATIONS)
def name(request):
  return request.param


def shapes(tree):
  return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def test_a_states_structure_and_shapes_stay(name):
  tx, params = TRANSFORMATIONS[name]
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  # Weak types too: a scan's carry needs them.
  types = [
    [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    for tree in (after, state)
  ]
  assert types[0] == types[1]
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert shapes(updates) == shapes(params)


def test_half_precision_updates_stay_so(name):
  tx, params = TRANSFORMATIONS[name]
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  updates, _ = jax.eval_shape(
    tx.update, half, jax.eval_shape(tx.init, half), half
  )
  assert shapes(updates) == shapes(half)


def test_unknown_extra_arguments_are_taken_and_the_radius_counts(name):
  tx, params = TRANSFORMATIONS[name]
  tx = optax.with_extra_args_support(tx)

  @jax.jit
  def update(radius):
    return tx.update(
      params, tx.init(params), params, value=jnp.float32(1), radius=radius
    )

  _, state = update(jnp.float32(0.01))
  found = optax.tree.get_all_with_path(state, "radius")
  assert [float(x) for _, x in found] == [pytest.approx(0.01)] * (
    name in WITH_A_BALL
  )


def test_map_params_reaches_what_is_like_the_parameters(name):
  tx, params = TRANSFORMATIONS[name]
  state = jax.eval_shape(tx.init, params)
  marked = optax.tree.map_params(
    tx,
    lambda x: "of a parameter",
    state,
    transform_non_params=lambda x: "other",
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  kinds = [x for x in jax.tree.leaves(marked) if isinstance(x, str)]
  assert "other" in kinds
  # A ball alone has no state of the parameters' shapes.
  assert ("of a parameter" in kinds) == (name != "keep_in_ball")
  count = optax.tree.get_all_with_path(marked, "count")
  assert count and all(x == "other" for _, x in count)


def test_states_and_parameters_go_through_flax_serialization(name):
  tx, params = TRANSFORMATIONS[name]
  _, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
  saved = serialization.to_bytes((params, state))
  blank = jax.tree.map(jnp.zeros_like, (params, state))
  back = serialization.from_bytes(blank, saved)
  assert jax.tree.structure(back) == jax.tree.structure((params, state))
  for x, y in zip(jax.tree.leaves(back), jax.tree.leaves((params, state))):
    np.testing.assert_array_equal(x, y)


NODES = {"pair": PAIR, **KINDS}
NODES["orthonormal"] = variants.OrthonormalA(PAIR.a, PAIR.b, 0.5)


@pytest.mark.parametrize("kind", NODES)
def test_nodes_go_through_jax_export(kind):
  node = NODES[kind]
  exported = export.export(jax.jit(lambda x: {"w": x, "n": x.squared_norm()}))(
    jax.eval_shape(lambda: node)
  )
  back = export.deserialize(exported.serialize())
  result = back.call(node)
  assert jax.tree.structure(result["w"]) == jax.tree.structure(node)
  np.testing.assert_allclose(result["n"], node.squared_norm(), rtol=1e-6)


@pytest.mark.parametrize("kind", NODES)
def test_nodes_of_another_kind_or_scale_are_not_restored(kind):
  node = NODES[kind]
  state = serialization.to_state_dict(node)
  first = next(iter(state))
  with pytest.raises(ValueError, match=rf"at \./w: {first} is missing"):
    serialization.from_state_dict(
      {"w": node}, {"w": {k: v for k, v in state.items() if k != first}}
    )
  static = [
    f.name for f in dataclasses.fields(node) if f.metadata.get("static")
  ]
  for field in static:
    with pytest.raises(ValueError, match=rf"{field} is 99 there and"):
      serialization.from_state_dict({"w": node}, {"w": {**state, field: 99}})


INJECTED = {
  "keep_in_ball": (keep_in_ball, {"rho": 0.01}, PARTS["primary"]),
  "bilora": (bilora, {"optimizer": ADAM, "rho": 0.01}, PARTS),
  "shared_a": (
    variants.shared_a,
    {"optimizer": ADAM, "rho": 0.01},
    variants.share_a(PARTS),
  ),
  "adaptive_radius": (
    variants.adaptive_radius,
    {"tx": bilora(ADAM), "ratio": 0.01},
    PARTS,
  ),
  "power_ascent": (variants.power_ascent, {"decay": 0.5}, PARTS["primary"]),
  "balanced": (
    baselines.balanced,
    {"optimizer": ADAM, "rate": 0.01, "by": "factors"},
    PARTS,
  ),
  "lora_plus": (baselines.lora_plus, {"optimizer": ADAM, "ratio": 4.0}, PARTS),
}


@pytest.mark.parametrize("factory", INJECTED)
def test_numbers_can_be_injected(factory):
  make, arguments, params = INJECTED[factory]
  number = next(k for k, x in arguments.items() if isinstance(x, float))
  injected = optax.inject_hyperparams(make)(**arguments)

  def updated(tx):
    return jax.jit(
      lambda params: tx.update(params, tx.init(params), params)[0]
    )(params)

  expected = updated(make(**arguments))
  for x, y in zip(
    jax.tree.leaves(updated(injected)), jax.tree.leaves(expected)
  ):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  # A schedule of it is read step by step, outside of jit too.
  injected = optax.inject_hyperparams(make)(
    **{**arguments, number: lambda count: arguments[number]}
  )
  state = injected.init(params)
  _, state = injected.update(params, state, params)
  assert float(state.hyperparams[number]) == pytest.approx(arguments[number])


PUBLIC = {
  f"{module.__name__}.{key}": value
  for module in (bilora_jax, adapters, baselines, variants)
  for key, value in vars(module).items()
  if not key.startswith("_") and inspect.isfunction(value)
}
_ORDER = ["Args:", "Returns:", "Raises:", "Examples:", "References:", ".. note"]


@pytest.mark.parametrize("path", PUBLIC)
def test_docstrings_have_optaxs_order(path):
  function = PUBLIC[path]
  text = inspect.getdoc(function) or ""
  sections = re.findall(rf"^({'|'.join(map(re.escape, _ORDER))})", text, re.M)
  assert sections == sorted(sections, key=_ORDER.index)
  assert re.match(r"[^\n]+[.:]\n(\n|$)|[^\n]+\.$", text), "one line comes first"
  parameters = set(inspect.signature(function).parameters)
  told = re.search(r"^Args:\n((?:  .*\n|\n)+)", text + "\n", re.M)
  named = set(re.findall(r"^  \*{0,2}(\w+):", told[1], re.M)) if told else set()
  assert named == parameters
