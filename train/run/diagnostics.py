"""What the auxiliary does while it climbs, logged every few steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilora_jax import Factors, sharpness

from ..data.objectives import Batch, Objective
from ..methods.method import Method
from ..methods.trained import kernels


class Diagnosis(NamedTuple):
  """Scalars; cosines and overlaps are over all adapted weights together.

  Attributes:
    cosine_present: of the auxiliary's weights with the gradient of the step
      that meets them, at the weights with the auxiliary: is its direction
      stale?
    cosine_sam: with the gradient at the weights without it, which SAM's own
      perturbation has the direction of.
    overlap_gradient: of the auxiliary's subspaces with as many of that
      gradient's top singular directions; 1 is the best of its rank.
    overlap_primary: of the auxiliary's subspaces with the primary's.
    turnover: 1 - cosine of the auxiliary's weights with those diagnosed last.
  """

  cosine_present: jax.Array
  cosine_sam: jax.Array
  overlap_gradient: jax.Array
  overlap_primary: jax.Array
  turnover: jax.Array


def make(
  method: Method, objective: Objective
) -> Callable[[Any, Any, Any, Batch], Diagnosis]:
  """Returns `(variables, trained, auxiliary, batch)` to the diagnosis.

  `auxiliary` is that of the last diagnosis. It costs two gradients by the dense
  weights, and a singular value decomposition of each.

  Args:
    method: one that trains an auxiliary, on weights that are floats.
    objective: what is learned from a batch.
  """
  assert method.adapted is not None
  # With the adapted kernels among what is differentiated.
  dense = method._replace(weights=kernels(method.adapted))

  def loss_fn(params, variables, batch):
    trained, variables = dense.unpacked(params, variables)
    found = method.apply(variables, trained, *objective.inputs(batch))
    items = objective.items(found, batch)
    return items.mean(items.losses)

  def gradient(trained, variables, batch):
    params = dense.differentiated(trained, variables)
    grads = jax.grad(loss_fn)(params, variables, batch)["weights"]
    # Of kernels of more axes than two, as their pair has them.
    return jax.tree.map(
      lambda g, pair: g.reshape(*pair.a.shape[:-1], pair.b.shape[-1]),
      grads,
      trained["primary"],
    )

  @jax.jit
  def diagnose(variables, trained, auxiliary, batch):
    own = trained["auxiliary"]
    present = gradient(trained, variables, batch)
    without = gradient(method.evaluated(trained), variables, batch)
    pairs = jax.tree.leaves(own, is_leaf=lambda x: isinstance(x, Factors))
    rank = max(pair.rank for pair in pairs)
    return Diagnosis(
      cosine_present=sharpness.cosine(own, present),
      cosine_sam=sharpness.cosine(own, without),
      overlap_gradient=sharpness.gradient_overlap(own, without, rank).mean,
      overlap_primary=sharpness.subspace_overlap(own, trained["primary"]).mean,
      turnover=sharpness.turnover(auxiliary, own),
    )

  return diagnose
