"""Sharpness at the end of a run: how far the training loss rises nearby.

All points are on the same rows. With R radii, of N rows a measurement costs a
gradient over the N rows for each space and R losses over them for each
direction: one in LoRA space; in full space the gradient's, that of low rank and
the random ones. Of 64 rows, in batches of 32, three radii and one random
direction that is the time of 12 steps of training at the batches' full length.
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

# Directions more than are wanted, and products with the matrix and back.
_MORE, _ITERATIONS = 8, 6

Measure = Callable[[Any, Any, Any, jax.Array], dict[str, Any]]
Means = Callable[[Any], jax.Array]
"""From parameters to the mean loss and the accuracy, `[2]`."""


def batches(data: data_lib.Data, rows: int, batch_size: int) -> Batch:
  """The first training batches, padded to one length.

  Their rows and order are drawn by the seed alone, so that they are the same
  for all methods.

  Args:
    data: of the run.
    rows: how many; at least one batch, and what fills none is left out.
    batch_size: rows of a batch.

  Returns:
    A batch with the batches in front: tokens (batches, B, L), or images
    (batches, B, height, width).
  """
  count = max(rows // batch_size, 1)
  found = [batch for _, batch in zip(range(count), data.train_batches())]

  def stacked(*parts):
    shape = np.max([x.shape for x in parts], axis=0)
    # Zeros are what is padding to a mask and to a weight.
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
  """Returns `(variables, evaluated, batches, key)` to what is measured.

  That is, by the names of the table `sharpness` of a row: `loss` and `accuracy`
  at the weights; for each space the gradient's norm, and for each direction
  the rises of the loss at the radii and the accuracies there.

  Args:
    method: what was trained.
    model: without adapters.
    targets: paths of the kernels that are the full space.
    objective: what was learned.
    options: of the study.
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
  """The kernels by their paths, and the model as a function of them."""
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
  """Means over batches, and means with the gradient of the loss.

  One batch after the other: what is kept is what one needs.
  """
  count = jax.tree.leaves(data)[0].shape[0]

  def loss(params, batch):
    items = objective.items(apply(params, *objective.inputs(batch)), batch)
    mean = items.mean(items.losses)
    return mean, jnp.stack([mean, items.mean(items.right)])

  def summed(one: Callable[[Any], Any]):
    one = jax.jit(one)  # traced once, for its shapes and for the scan
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
  """The unit direction of low rank in which the linearised loss rises most.

  As `sharpness.low_rank` finds it, without its singular value decompositions,
  which would take longer than all else that is measured.
  """
  leaves, structure = jax.tree.flatten(gradient)
  keys = jax.random.split(key, len(leaves))
  return sharpness.direction(
    structure.unflatten([truncated(k, g, rank) for k, g in zip(keys, leaves)])
  )


def truncated(key: jax.Array, matrix: jax.Array, rank: int) -> jax.Array:
  """Nearly the best approximation of a rank, by subspace iteration.

  Args:
    key: random key of where the iteration starts.
    matrix: `(..., in, out)`, each of the leading axes' a matrix of its own; a
      kernel of more axes is taken as it is stored.
    rank: of the approximation.

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

  # In turn: batches can hang on jaxlib's CPU, see `bilora_jax._linalg`.
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
