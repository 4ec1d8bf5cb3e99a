"""Sharpness at the end of a run: how much the training loss rises nearby.

All losses are over the same N rows. Each space costs a gradient over these
rows. Each direction costs R losses over them, for R radii. LoRA space has one
direction. Full space has the gradient's direction, the low-rank direction and
the random directions.

With 64 rows in batches of 32, three radii and one random direction, the
measurement takes as long as 12 training steps at the batches' full length.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilora_jax import sharpness

from ..data import load as data_lib
from ..data.objectives import Objective
from ..data.pipeline import Batch
from ..methods import method as methods
from .spec import Sharpness

# The additional directions, and the products with the matrix and its transpose,
# of a subspace iteration.
_MORE, _ITERATIONS = 8, 6

Measure = Callable[[Any, Any, Any, jax.Array], dict[str, Any]]
Means = Callable[[Any], jax.Array]
"""A function from parameters to the mean loss and the accuracy, `[2]`."""


def batches(data: data_lib.Data, rows: int, batch_size: int) -> Batch:
  """Returns the first training batches, padded to one length.

  Their rows and order depend only on the seed, so all methods have the same
  batches.

  Args:
    data: the data of the run.
    rows: the number of rows. It is rounded down to whole batches, but at least
      one batch.
    batch_size: rows of a batch.

  Returns:
    A batch with a leading axis of batches: tokens (batches, B, L), or images
    (batches, B, height, width).
  """
  count = max(rows // batch_size, 1)
  found = [batch for _, batch in zip(range(count), data.train_batches())]

  def stacked(*parts):
    shape = np.max([x.shape for x in parts], axis=0)
    # Zeros are padding in masks and in weights.
    return np.stack(
      [
        np.pad(x, [(0, size - own) for size, own in zip(shape, x.shape)])
        for x in parts
      ]
    )

  return jax.tree.map(stacked, *found)


def make(
  method: methods.Method,
  model: Any,
  targets: list[str],
  objective: Objective,
  options: Sharpness,
) -> Measure:
  """Returns a function from `(variables, evaluated, batches, key)` to results.

  The results have the names of the table `sharpness` of a row. They are the
  `loss` and `accuracy` at the weights; for each space, the gradient's norm; and
  for each direction, the rises of the loss and the accuracies at the radii.

  Args:
    method: the method that trained the weights.
    model: the model without adapters.
    targets: the paths of the kernels of full space.
    objective: the objective of the loss.
    options: the study's options of sharpness.
  """
  radii = jnp.asarray(options.radii, jnp.float32)

  def along(means: Means, params, direction, base):
    there = jax.lax.map(
      lambda r: means(sharpness.move(params, direction, r)), radii
    )
    return {"rise": there[:, 0] - base[0], "accuracy": there[:, 1]}

  def in_full_space(variables, evaluated, data, key):
    merged = method.merged(variables, evaluated)
    kernels, apply = in_kernels(model, merged, targets)
    means, grads = over(apply, objective, data)
    base, gradient = grads(kernels)
    found = {
      "norm": _norm(gradient),
      "one_step": along(means, kernels, sharpness.direction(gradient), base),
    }
    if options.low_rank:
      found["low_rank"] = along(
        means, kernels, _worst(key, gradient, options.low_rank), base
      )
    if options.average:
      draws = [
        along(means, kernels, _random(k, kernels), base)
        for k in jax.random.split(key, options.average)
      ]
      found["average"] = jax.tree.map(
        lambda *x: jnp.mean(jnp.stack(x), axis=0), *draws
      )
    return base, found

  def in_lora_space(variables, evaluated, data):
    def apply(pairs, *inputs):
      return method.apply(variables, {**evaluated, **pairs}, *inputs)

    pairs = {part: x for part, x in evaluated.items() if part != "extra"}
    means, grads = over(apply, objective, data)
    base, gradient = grads(pairs)
    ascent = sharpness.direction(gradient)
    return base, {
      "norm": _norm(gradient),
      "one_step": along(means, pairs, ascent, base),
    }

  @jax.jit
  def measure(variables, evaluated, data, key):
    found, base = {}, None
    if "full" in options.spaces:
      base, found["full"] = in_full_space(variables, evaluated, data, key)
    if "lora" in options.spaces and method.adapted is not None:
      base, found["lora"] = in_lora_space(variables, evaluated, data)
    if base is not None:
      found |= {"loss": base[0], "accuracy": base[1]}
    return found

  return measure


def in_kernels(
  model: Any, variables: Any, targets: list[str]
) -> tuple[dict[str, jax.Array], Callable[..., jax.Array]]:
  """Returns kernels by their paths, and the model as a function of them."""
  flat: dict[Any, Any] = traverse_util.flatten_dict(
    variables["params"], sep="/"
  )

  def apply(kernels, *inputs):
    params = traverse_util.unflatten_dict({**flat, **kernels}, sep="/")
    return model.apply({**variables, "params": params}, *inputs)

  return {path: flat[path] for path in targets}, apply


def over(
  apply: Callable[..., jax.Array], objective: Objective, data: Any
) -> tuple[Means, Callable[[Any], tuple[jax.Array, Any]]]:
  """Returns functions for means over batches, without and with the gradient.

  The batches run one after the other, so the memory is that of one batch.
  """
  count = jax.tree.leaves(data)[0].shape[0]

  def loss(params, batch):
    items = objective.items(apply(params, *objective.inputs(batch)), batch)
    mean = items.mean(items.losses)
    return mean, jnp.stack([mean, items.mean(items.right)])

  def summed(one: Callable[[Any], Any]):
    one = jax.jit(one)  # one trace serves the shapes and the scan
    first = jax.tree.map(lambda x: x[0], data)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first)
    )
    total, _ = jax.lax.scan(
      lambda total, batch: (jax.tree.map(jnp.add, total, one(batch)), None),
      zeros,
      data,
    )
    return jax.tree.map(lambda x: x / count, total)

  def means(params):
    return summed(lambda batch: loss(params, batch)[1])

  def gradient(params):
    def one(batch):
      (_, found), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
      return found, grads

    return summed(one)

  return means, gradient


def _worst(key: jax.Array, gradient: Any, rank: int) -> Any:
  """Returns the low-rank unit direction of the linearised loss's largest rise.

  `sharpness.low_rank` finds this direction by singular value decompositions,
  which would take longer than the whole measurement.
  """
  leaves, structure = jax.tree.flatten(gradient)
  keys = jax.random.split(key, len(leaves))
  return sharpness.direction(
    structure.unflatten([truncated(k, g, rank) for k, g in zip(keys, leaves)])
  )


def truncated(key: jax.Array, matrix: jax.Array, rank: int) -> jax.Array:
  """Returns nearly the best approximation of a rank, by subspace iteration.

  Args:
    key: the random key of the iteration's start.
    matrix: `(..., in, out)`; the leading axes hold separate matrices. A kernel
      with more axes is used in its stored shape.
    rank: the rank of the approximation.

  Returns:
    An array like `matrix`, float32.

  References:
    Halko, Martinsson and Tropp, `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2011, algorithms 4.4 and 5.1.
  """
  size_in, size_out = matrix.shape[-2:]
  width = min(rank + _MORE, size_in, size_out)
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

  def of_one(arguments):
    start, matrix = arguments

    def iterate(_, basis):
      other = jnp.linalg.qr(product(matrix.T, basis))[0]
      return jnp.linalg.qr(product(matrix, other))[0]

    basis = jax.lax.fori_loop(
      0, _ITERATIONS, iterate, jnp.linalg.qr(product(matrix, start))[0]
    )
    u, sigma, vt = jnp.linalg.svd(product(basis.T, matrix), full_matrices=False)
    return product(basis, product(u[:, :rank] * sigma[:rank], vt[:rank]))

  # One matrix after the other: batched decompositions can hang in jaxlib on
  # CPU, see `bilora_jax._linalg`.
  matrices = matrix.astype(jnp.float32).reshape(-1, size_in, size_out)
  starts = jax.random.normal(key, (len(matrices), size_out, width))
  return jax.lax.map(of_one, (starts, matrices)).reshape(matrix.shape)


def _random(key: jax.Array, params: Any) -> Any:
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  return sharpness.direction(
    structure.unflatten(
      [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    )
  )


def _norm(tree: Any) -> jax.Array:
  return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
