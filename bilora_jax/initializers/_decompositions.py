"""Initialisations from the weights themselves: PiSSA and OLoRA."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilora_jax import _linalg
from bilora_jax._adapted import Adapted
from bilora_jax.initializers import _base


def pissa(
  adapted: Adapted, variables: Any, adapters: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
  r"""PiSSA: the primary starts at each weight's principal part.

  With the singular value decomposition :math:`W_0 = U S V^\top`, cut to the r1
  largest singular values, and in the paper's notation,

  .. math::
    B = U_r S_r^{1/2} / \sqrt s, \qquad A = S_r^{1/2} V_r^\top / \sqrt s,
    \qquad W_0 \leftarrow W_0 - s B A

  so that s B A is the best approximation of the weight for any s. (The paper
  has s = 1.)

  Args:
    adapted: the model. If its spec has a `base_dtype`, call `quantize` on the
      returned variables.
    variables: the model's, as floats.
    adapters: from `adapted.init`; the auxiliary and extra do not change.

  Returns:
    The variables to train on, with s B A subtracted from the adapted kernels
    (in float32, cast once), and the adapters. The trained adapters belong to
    these variables: merge them into these.

  Raises:
    ValueError: if variables or adapters are not the model's, or a rank is
      above the smaller side of its weight.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from bilora_jax import LoraSpec, adapt
    >>> from bilora_jax.initializers import pissa
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> adapted = adapt(model, LoraSpec(rank=2), x)
    >>> variables = model.init(jax.random.key(0), x)
    >>> base, adapters = pissa(
    ...   adapted, variables, adapted.init(jax.random.key(1), variables)
    ... )
    >>> y = adapted.apply(base, adapters, x)
    >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
    True

  References:
    Meng et al, `PiSSA: Principal Singular Values and Singular Vectors
    Adaptation of Large Language Models <https://arxiv.org/abs/2404.02948>`_,
    2024, equations 2 to 4.
  """

  def start(matrix, rank):
    u, sigma, vt = _linalg.svd(matrix)
    root = jnp.sqrt(sigma[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]

  return _of_weights("pissa", adapted, variables, adapters, start, True)


def olora(
  adapted: Adapted, variables: Any, adapters: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
  r"""OLoRA: the primary starts at the first part of a QR decomposition.

  With :math:`W_0 = Q R` in the paper's notation, with weights (out, in),

  .. math::
    B = Q_{:, :r}, \qquad A = R_{:r, :}, \qquad W_0 \leftarrow W_0 - s B A

  so that the columns of B are orthonormal.

  Args:
    adapted: as in `pissa`.
    variables: as in `pissa`.
    adapters: as in `pissa`.

  Returns:
    The variables to train on, and the adapters, as `pissa` does.

  Raises:
    ValueError: as `pissa`.

  References:
    Büyükakyüz, `OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2406.01775>`_, 2024, algorithm 1.
  """

  def start(matrix, rank):
    q, r = _linalg.qr(matrix.T)
    return r[:rank].T, q[:, :rank].T

  return _of_weights("olora", adapted, variables, adapters, start, False)


def _of_weights(
  name: str,
  adapted: Adapted,
  variables: Any,
  adapters: Mapping[str, Any],
  start: _base.Start,
  rescale: bool,
) -> tuple[Any, dict[str, Any]]:
  _base.check_ranks(name, adapted, times=1)
  weights: dict[Any, jax.Array] = _base.kernels(adapted, variables)
  return _base.start_from(
    adapted, variables, adapters, weights, start, rescale=rescale
  )
