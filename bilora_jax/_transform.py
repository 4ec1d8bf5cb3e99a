"""Bi-LoRA as an Optax gradient transformation."""

from typing import Any, Literal

import optax

from bilora_jax import _ball, _nodes, _partition


def bilora(
  optimizer: optax.GradientTransformation,
  rho: _ball.ScalarOrSchedule = 0.05,
  auxiliary_optimizer: optax.GradientTransformation | None = None,
  *,
  clip: _ball.Clip = "global",
  direction: Literal["ascent", "descent"] = "ascent",
  specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Bi-LoRA: the primary descends the loss, the auxiliary climbs it in a ball.

  For frozen :math:`W_0` and one gradient
  :math:`G = \nabla L(W_0 + B_1 A_1 + B_2 A_2)`, with gradient descent,

  .. math::

    \begin{align*}
      B_1 &\leftarrow B_1 - \eta\, G A_1^\top, &
      A_1 &\leftarrow A_1 - \eta\, B_1^\top G, \\
      B_2 &\leftarrow B_2 + \eta\, G A_2^\top, &
      A_2 &\leftarrow A_2 + \eta\, B_2^\top G,
    \end{align*}

  All four updates use the values before the step. Then all pairs
  :math:`(B_2, A_2)` are scaled back into the ball
  :math:`\sum_j \|B_{2,j} A_{2,j}\|_F^2 \le \rho^2`. The auxiliary approximates
  the perturbation of Sharpness-Aware Minimization at the cost of LoRA: a step
  needs one gradient.

  Args:
    optimizer: optimizer of the primary and of the extra parameters.
    rho: radius of the auxiliary's ball, in units of the weights, or a schedule
      of the radius; see `keep_in_ball`.
    auxiliary_optimizer: optimizer of the auxiliary; by default `optimizer`,
      with a separate state. It receives the negated gradient, so weight decay
      still decays.
    clip: see `keep_in_ball`.
    direction: `'ascent'`, or `'descent'` for the paper's ablation Dual-LoRA,
      in which the auxiliary descends too.
    specs: `PartitionSpec` of all parameters, as `Adapted.partition_specs`
      returns them; only under `jax.shard_map` and `jax.pmap` with sharded
      factors, see `keep_in_ball`.

  Returns:
    A transformation of the partition: a dict with `primary` and `auxiliary`,
    which are trees of `Factors` or of the nodes in `bilora_jax.adapters`, and,
    optionally, `extra`, a tree of any other parameters. Fields that a node
    lists in `held` do not change.

  Raises:
    ValueError: if rho is negative or not finite, or clip or direction is
      unknown; on init, if the parameters are not such a partition.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bilora_jax import bilora, Factors
    >>> pair = Factors(a=jnp.ones((4, 2)), b=jnp.zeros((2, 3)))
    >>> adapters = {'primary': {'w': pair}, 'auxiliary': {'w': pair}}
    >>> tx = bilora(optax.sgd(0.1), rho=0.05)
    >>> state = tx.init(adapters)
    >>> grads = jax.tree.map(jnp.ones_like, adapters)
    >>> updates, state = tx.update(grads, state, adapters)
    >>> adapters = optax.apply_updates(adapters, updates)
    >>> print(f"{adapters['auxiliary']['w'].frobenius_norm():.3f}")
    0.050
    >>> print(f"{optax.tree.get(state, 'auxiliary_norm'):.3f}")
    0.762

  References:
    Liu et al, `Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning
    Large-Scale Models <https://arxiv.org/abs/2508.19564>`_, 2025, equations
    (8) to (10).

  .. note::
    Wrap `bilora` in `optax.MultiSteps`, not the optimizer inside of it. In a
    chain, `bilora` comes last: a later transformation would move the auxiliary
    out of its ball. `hold_ball` allows later transformations. Evaluate with
    `without_auxiliary(adapters)`.
  """
  if direction not in ("ascent", "descent"):
    raise ValueError(f"direction is 'ascent' or 'descent'; got {direction!r}.")
  sign = -1.0 if direction == "ascent" else 1.0
  if auxiliary_optimizer is None:
    auxiliary_optimizer = optimizer
  inner = optax.partition(
    {
      "primary": _nodes.without_held(optimizer),
      "auxiliary": optax.chain(
        optax.scale(sign),
        _nodes.without_held(auxiliary_optimizer),
        _ball.keep_in_ball(rho, clip=clip, specs=specs),
      ),
    },
    _partition.labels,
  )

  def init_fn(params):
    if _partition.is_placeholder(params):
      return inner.init(params)
    _partition.check_parts(params)
    if "auxiliary" not in params:
      raise ValueError(
        "bilora trains a primary and an auxiliary; the parameters hold only "
        f"{sorted(params)}. For plain LoRA use the optimizer alone."
      )
    return inner.init(params)

  return optax.GradientTransformationExtraArgs(init_fn, inner.update)
