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

  all from the values before the step; then all of :math:`(B_2, A_2)` are
  scaled back into :math:`\sum_j \|B_{2,j} A_{2,j}\|_F^2 \le \rho^2`. The
  auxiliary approximates the adversary of Sharpness-Aware Minimization, at the
  cost of LoRA: nothing is evaluated twice.

  Args:
    optimizer: what the primary and the extra parameters descend with.
    rho: radius of the auxiliary's ball, in units of the weights, or a schedule
      of it; see `keep_in_ball`.
    auxiliary_optimizer: what the auxiliary climbs with; by default
      `optimizer`, with a state of its own. It is fed the negated gradient, so
      weight decay still decays.
    clip: see `keep_in_ball`.
    direction: `'ascent'`, or `'descent'` for the paper's ablation Dual-LoRA,
      in which the auxiliary descends too.
    specs: of all parameters, as `Adapted.partition_specs` gives them; only
      under `jax.shard_map` and `jax.pmap` with sharded factors, see
      `keep_in_frobenius_ball`.

  Returns:
    A transformation of the partition, a dict of `primary` and `auxiliary`,
    trees of `Factors` or of other nodes, as `bilora_jax.adapters` has them, and
    `extra`, any other parameters, which is optional. What nodes hold stays.

  Raises:
    ValueError: if rho is negative or not finite, clip or direction unknown; on
      init, if the parameters are not so partitioned.

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
    Wrap `bilora` in `optax.MultiSteps`, not the optimizer inside of it. Nothing
    follows it in a chain: the auxiliary would leave its ball, which `hold_ball`
    holds whatever follows. Evaluate with `without_auxiliary(adapters)`.
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
