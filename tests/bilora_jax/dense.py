"""What a model gives with its adapters, beside the same sums made densely."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilora_jax import Adapted, primary


class Outputs(NamedTuple):
  """Of the plain model, and of `W0` plus some parts, in two ways each."""

  plain: Any
  both: Any
  both_dense: Any
  primary: Any
  primary_dense: Any
  merged: Any


def outputs(
  adapted: Adapted,
  plain: Callable[[Any, Any], Any],
  variables: Any,
  adapters: Any,
  dense: Callable[[tuple[str, ...]], Any],
  x: Any,
) -> Outputs:
  """All of them, in one compiled function.

  Args:
    adapted: the model with adapters.
    plain: `(variables, x)` to the output of the model without.
    variables: of the model.
    adapters: for it, none of them zero.
    dense: names of parts to variables at `W0` plus these, by hand.
    x: the input.
  """

  @jax.jit
  def run(variables, adapters, both, one):
    return Outputs(
      plain(variables, x),
      adapted.apply(variables, adapters, x),
      plain(both, x),
      adapted.apply(variables, primary(adapters), x),
      plain(one, x),
      plain(adapted.merge(variables, adapters), x),
    )

  return run(
    variables, adapters, dense(("primary", "auxiliary")), dense(("primary",))
  )
