"""Diagnoses of the auxiliary adapter, which are logged every few steps."""

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
    cosine_present: the cosine of the auxiliary's weights and the gradient of
      the step that uses them, at the weights with the auxiliary. A low value
      means that the auxiliary's direction is stale.
    cosine_sam: the cosine of the auxiliary's weights and the gradient at the
      weights without the auxiliary. SAM's perturbation has the direction of
      this gradient.
    overlap_gradient: the overlap of the auxiliary's subspaces with the top
      singular directions of SAM's gradient, as many as the rank; 1 is the best
      possible value.
    overlap_primary: the overlap of the auxiliary's subspaces with the
      primary's.
    turnover: 1 - the cosine of the auxiliary's weights and those of the
      previous diagnosis.
  """

  cosine_present: jax.Array
  cosine_sam: jax.Array
  overlap_gradient: jax.Array
  overlap_primary: jax.Array
  turnover: jax.Array


def make(
  method: Method, objective: Objective
) -> Callable[[Any, Any, Any, Batch], Diagnosis]:
  """Returns a function from `(variables, trained, auxiliary, batch)`.

  The function returns the diagnosis. `auxiliary` is the auxiliary of the
  previous diagnosis. A diagnosis costs two gradients by the dense weights, and
  a singular value decomposition for each weight.

  Args:
    method: a method with an auxiliary, on weights that are floats.
    objective: the objective of the loss.
  """
  assert method.adapted is not None
  # This method also differentiates by the adapted kernels.
  dense = method._replace(weights=kernels(method.adapted))

  def loss_fn(params, variables, batch):
    trained, variables = dense.unpacked(params, variables)
    found = method.apply(variables, trained, *objective.inputs(batch))
    items = objective.items(found, batch)
    return items.mean(items.losses)

  def gradient(trained, variables, batch):
    params = dense.differentiated(trained, variables)
    grads = jax.grad(loss_fn)(params, variables, batch)["weights"]
    # A kernel with more than two axes gets the matrix shape of its factors.
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
