"""LoRA+: a larger learning rate for the factor that starts at zero.

With `loss_fn(params, batch)`,

  tx = baselines.lora_plus(optax.adam(5e-4), ratio=16.0)
  opt_state = tx.init(params)
  for key, batch in batches:
    grads = jax.grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
"""

import math

import jax
import jax.core
import optax

from bilora_jax._factors import Factors, is_factors


def lora_plus(
  optimizer: optax.GradientTransformation, ratio: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
  r"""LoRA+: the learning rate of B is a multiple of the learning rate of A.

  With :math:`u_A, u_B` the updates of an optimizer at the learning rate
  :math:`\eta`, and :math:`\lambda` the ratio,

  .. math:: A \leftarrow A + u_A, \qquad B \leftarrow B + \lambda\, u_B

  The ratio multiplies the whole update, also AdamW's decoupled weight decay.

  Args:
    optimizer: an optimizer with the learning rate of A, which is also the
      learning rate of parameters outside of pairs.
    ratio: learning rate of `b` over that of `a`, above 0; 1 or more in the
      paper, where 16 is the value to begin with.

  Returns:
    A transformation of any tree; it scales only the `b` of `Factors`.

  Raises:
    ValueError: if the ratio is not finite and positive.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bilora_jax import Factors
    >>> params = {'w': Factors(jnp.ones((3, 1)), jnp.zeros((1, 2)))}
    >>> tx = lora_plus(optax.sgd(0.1), ratio=16.0)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(f"{updates['w'].a[0, 0]:.1f} {updates['w'].b[0, 0]:.1f}")
    -0.1 -1.6

  References:
    Hayou et al, `LoRA+: Efficient Low Rank Adaptation of Large Models
    <https://arxiv.org/abs/2402.12354>`_, 2024, section 4.
  """
  # Under optax.inject_hyperparams ratio is traced, and its value is unknown.
  if not isinstance(ratio, jax.core.Tracer) and not (
    math.isfinite(ratio) and ratio > 0
  ):
    raise ValueError(
      "ratio, the learning rate of b over that of a, is finite and above 0; "
      f"got {ratio}."
    )

  def faster(node):
    if not is_factors(node):
      return node
    # jax.tree.map, as b may be masked.
    b = jax.tree.map(lambda u: (ratio * u).astype(u.dtype), node.b)
    return Factors(node.a, b, node.scale)

  def scale_b(updates, params=None):
    del params
    return jax.tree.map(faster, updates, is_leaf=is_factors)

  return optax.chain(optimizer, optax.stateless(scale_b))
