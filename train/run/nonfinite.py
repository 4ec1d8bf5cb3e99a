"""Skips steps that are not finite, without a branch in the program."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def skip_nonfinite(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Returns a transformation that skips updates that are not finite.

  An update is skipped if its gradients or its loss are not finite.

  `optax.apply_if_finite` uses a branch. At a branch, the host of a GPU waits
  for the device's decision, and XLA cannot fuse across it. With it, MiniLM's
  step of Bi-LoRA took 2.25 times as long as LoRA's on an H200. This function
  computes both results, and selects each number from one of them.

  Args:
    tx: the transformation.

  Returns:
    A transformation whose state is that of `optax.apply_if_finite`. Its update
    takes the extra argument `value`, the loss, and passes it on.
  """
  inner = optax.with_extra_args_support(tx)

  def init_fn(params):
    return optax.ApplyIfFiniteState(
      notfinite_count=jnp.zeros([], jnp.int32),
      last_finite=jnp.array(True),
      total_notfinite=jnp.zeros([], jnp.int32),
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    finite = jnp.isfinite(extra_args["value"])
    for update in jax.tree.leaves(updates):
      finite &= jnp.all(jnp.isfinite(update))

    def chosen(new: Any, old: Any) -> Any:
      return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

    # Decompositions of NaN may never end, so the transformation gets zeros.
    zeros = optax.tree.zeros_like(updates)
    updates, inner_state = inner.update(
      chosen(updates, zeros),
      state.inner_state,
      params,
      **extra_args,
    )
    skipped = jnp.asarray(~finite, jnp.int32)
    return chosen(updates, zeros), optax.ApplyIfFiniteState(
      notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
      last_finite=finite,
      total_notfinite=state.total_notfinite + skipped,
      inner_state=chosen(inner_state, state.inner_state),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
