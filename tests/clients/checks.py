"""What has to hold of a model that others wrote: one check for all of them."""

from collections import Counter
from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import bilora_jax
from bilora_jax import LoraSpec

RHO = 0.01
STEPS = 8
# Products of width 64 or less in float32, summed in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@dataclasses.dataclass(frozen=True)
class Client:
  """A model, what it is called with, and what is expected of it.

  Attributes:
    model: of Linen or NNX.
    variables: its own.
    args: what it is called with.
    kwargs: what it is called with, by name.
    loss: of what the model returns, a scalar.
    exclude: the spec's.
    found: how many weights are adapted in modules of each name.
  """

  model: Any
  variables: Any
  loss: Callable[[Any], jax.Array]
  found: Mapping[str, int]
  args: tuple[Any, ...] = ()
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  exclude: str | None = None


def cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
  """Mean loss of `(..., classes)` at `(...)`."""
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), jnp.asarray(labels)
  )
  return losses.mean()


def tokens(*shape: int, below: int) -> np.ndarray:
  """Counts that each start elsewhere, so that the next is to be learnt."""
  starts = np.random.default_rng(0).integers(0, below, (*shape[:-1], 1))
  return ((starts + np.arange(shape[-1])) % below).astype(np.int32)


def next_token_loss(logits: jax.Array, inputs: Any) -> jax.Array:
  """Of logits `(batch, length, vocabulary)` at the tokens that follow."""
  return cross_entropy(logits[:, :-1], inputs[:, 1:])


def check(client: Client, folder: pathlib.Path) -> None:
  """Adapts, trains, merges, saves and loads.

  Args:
    client: the model.
    folder: an empty one, to save to.
  """
  spec = LoraSpec(rank=2, alpha=4.0, auxiliary_rank=2, exclude=client.exclude)
  adapted = bilora_jax.adapt(client.model, spec, *client.args, **client.kwargs)
  found = Counter(path.split("/")[-2] for path in adapted.targets)
  assert found == client.found, (found, adapted.skipped)
  adapted = adapted.eval() if isinstance(client.model, nnx.Module) else adapted

  start = adapted.init(jax.random.key(1), client.variables)
  _assert_close(_adapted_outputs(adapted, client, start), _base_outputs(client))

  trained, state = _check_training(adapted, client, start)
  _check_merging(adapted, client, trained)
  _check_saving(adapted, trained, state, folder)


def _check_training(
  adapted: bilora_jax.Adapted, client: Client, adapters: Any
) -> tuple[Any, Any]:
  """The loss falls, the auxiliary stays in its ball, the old is donated."""
  tx = bilora_jax.bilora(optax.adamw(1e-2, weight_decay=0.0), rho=RHO)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(adapters, state, variables):
    def loss_fn(adapters):
      outputs = adapted.apply(
        variables, adapters, *client.args, **client.kwargs
      )
      return client.loss(outputs)

    loss, grads = jax.value_and_grad(loss_fn)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss

  # The caller's own stay: what is donated is deleted.
  adapters = jax.tree.map(jnp.copy, adapters)
  state = tx.init(adapters)
  losses, clip_factors = [], []
  for _ in range(STEPS):
    before = jax.tree.leaves(adapters)
    adapters, state, loss = step(adapters, state, client.variables)
    assert all(x.is_deleted() for x in before)
    losses.append(float(loss))
    clip_factors.append(float(optax.tree.get(state, "clip_factor")))
    assert dense_norm(adapters["auxiliary"]) <= RHO * (1 + 1e-5)
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0]
  assert min(clip_factors) < 1  # it was the ball that held it
  return adapters, state


def _check_merging(
  adapted: bilora_jax.Adapted, client: Client, adapters: Any
) -> None:
  """A plain model at the merged variables is the primary's."""
  primary = bilora_jax.without_auxiliary(adapters)
  merged = adapted.merge(client.variables, adapters)
  of_primary = _adapted_outputs(adapted, client, primary)
  _assert_close(
    _base_outputs(dataclasses.replace(client, variables=merged)), of_primary
  )
  base = jax.tree.leaves(_base_outputs(client))
  assert any(
    np.abs(x - y).max() > 1e-4
    for x, y in zip(base, jax.tree.leaves(of_primary))
  )


def _check_saving(
  adapted: bilora_jax.Adapted, adapters: Any, state: Any, folder: pathlib.Path
) -> None:
  """Our own files, and Orbax's, hold the same bits."""
  path = folder / "adapters.safetensors"
  bilora_jax.save_adapters(path, adapted, adapters)
  assert_same(bilora_jax.load_adapters(path, adapted), adapters)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "orbax", (adapters, state))
    checkpointer.wait_until_finished()
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, (adapters, state))
    assert_same(
      checkpointer.restore(folder / "orbax", shapes), (adapters, state)
    )


def _adapted_outputs(
  adapted: bilora_jax.Adapted, client: Client, adapters: Any
) -> Any:
  return jax.jit(
    lambda variables, adapters: _arrays(
      adapted.apply(variables, adapters, *client.args, **client.kwargs)
    )
  )(client.variables, adapters)


def _base_outputs(client: Client) -> Any:
  """What the model returns by itself, without us."""
  if isinstance(client.model, nn.Module):
    call = client.model.apply
  else:
    graph = nnx.graphdef(nnx.merge(*nnx.split(client.model)))

    def call(variables, *args, **kwargs):
      model = nnx.merge(graph, variables)
      model.eval()
      return model(*args, **kwargs)

  return jax.jit(
    lambda variables: _arrays(call(variables, *client.args, **client.kwargs))
  )(client.variables)


def _arrays(outputs: Any) -> list[jax.Array]:
  """The arrays in what a model returns, which may have a type of its own."""
  return jax.tree.leaves(outputs)


def dense_norm(auxiliary: Any) -> float:
  """The Frobenius norm of all products, formed in float64."""
  pairs = jax.tree.leaves(
    auxiliary, is_leaf=lambda x: isinstance(x, bilora_jax.Factors)
  )
  return float(
    np.sqrt(
      sum(
        np.square(
          x.scale * np.asarray(x.a, np.float64) @ np.asarray(x.b, np.float64)
        ).sum()
        for x in pairs
      )
    )
  )


def _assert_close(found: Any, expected: Any) -> None:
  found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
  assert len(found) == len(expected) > 0
  for x, y in zip(found, expected):
    np.testing.assert_allclose(x, y, **CLOSE)


def assert_same(found: Any, expected: Any) -> None:
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
