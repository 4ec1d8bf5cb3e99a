"""Counts what a step evaluates, on its jaxpr: forward passes and gradients."""

import collections
from collections.abc import Callable, Iterator
import itertools
from typing import Any, TypeAlias

import jax
from jax.extend import core

# How often each pass was made, as `{("forward", 8): 2, ("gradient", 8): 1}`:
# the number is that of the rows, the first axis of what was marked.
Cost: TypeAlias = collections.Counter[tuple[str, int]]


def _primitive(name: str) -> core.Primitive:
  primitive = core.Primitive(name)
  primitive.def_abstract_eval(lambda x: x)
  return primitive


_FORWARD = _primitive("marked_forward")
_GRADIENT = _primitive("marked_gradient")


@jax.custom_vjp
def mark(x: jax.Array) -> jax.Array:
  """The identity, which `costs` sees in both passes; to trace, not to run.

  A gradient is seen if what is marked depends on what is differentiated by: so
  mark logits or losses, one row a sample.
  """
  return _FORWARD.bind(x)


mark.defvjp(
  lambda x: (_FORWARD.bind(x), None),
  lambda _, cotangent: (_GRADIENT.bind(cotangent),),
)


def costs(function: Callable[..., Any], *args: Any) -> list[Cost]:
  """What a function evaluates of a marked loss, for each way it can go.

  Args:
    function: any of `jax.make_jaxpr`'s; a scan's body counts as often as it
      runs. A loop of unknown length may hold no mark.
    args: arrays or `jax.ShapeDtypeStruct`.

  Returns:
    One cost, or, where `jax.lax.cond` branches to different costs, one for each
    combination of branches, in their order: that of false first.
  """
  return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr: core.Jaxpr) -> list[Cost]:
  ways = [collections.Counter()]
  for equation in jaxpr.eqns:
    ways = [a + b for a, b in itertools.product(ways, _of_equation(equation))]
  return ways


def _of_equation(equation: core.JaxprEqn) -> list[Cost]:
  name, params = equation.primitive.name, equation.params
  if equation.primitive in (_FORWARD, _GRADIENT):
    rows = equation.invars[0].aval.shape[0]
    return [collections.Counter({(name.removeprefix("marked_"), rows): 1})]
  if name == "cond":
    ways = [way for branch in params["branches"] for way in _of(branch.jaxpr)]
    # Ways of one cost are one: each decomposition branches by the platform.
    return [way for i, way in enumerate(ways) if way not in ways[:i]]
  ways = [collections.Counter()]
  for inner in _jaxprs(params):
    ways = [a + b for a, b in itertools.product(ways, _of(inner))]
  if name == "while":
    assert not any(ways), "a loop of unknown length holds a mark"
  repeats = params["length"] if name == "scan" else 1
  return [
    collections.Counter({key: repeats * n for key, n in way.items()})
    for way in ways
  ]


def _jaxprs(node: Any) -> Iterator[core.Jaxpr]:
  """The jaxprs that an equation holds, in whatever parameter."""
  if isinstance(node, core.ClosedJaxpr):
    yield node.jaxpr
  elif isinstance(node, core.Jaxpr):
    yield node
  elif isinstance(node, dict):
    yield from _jaxprs(list(node.values()))
  elif isinstance(node, list | tuple):
    for item in node:
      yield from _jaxprs(item)
