"""LoRA-GA: an initialisation whose first step approximates full fine-tuning."""

from collections.abc import Mapping
import math
from typing import Any

from flax import nnx, traverse_util
from flax.core import meta
import jax

from bilora_jax import _linalg
from bilora_jax._adapted import Adapted
from bilora_jax._site import Path
from bilora_jax.initializers import _base


def lora_ga(
  adapted: Adapted,
  variables: Any,
  adapters: Mapping[str, Any],
  gradients: Any,
  gamma: float = 16.0,
) -> tuple[Any, dict[str, Any]]:
  r"""LoRA-GA: the primary starts along the gradient's singular vectors.

  Let :math:`G = U S V^\top` be the gradient of the loss in an (m x n) weight.
  In the paper's notation,

  .. math::
    A = \frac{m^{1/4}}{\sqrt\gamma} V_{:, 1:r}^\top, \qquad
    B = \frac{m^{1/4}}{\sqrt\gamma} U_{:, r+1:2r}, \qquad
    W_0 \leftarrow W_0 - s B A

  so that the first step of the product is the best rank-2r approximation of the
  gradient.

  Args:
    adapted: the model. The paper has `rslora=True` in the spec; any spec works.
      If it has a `base_dtype`, call `quantize` on the returned variables.
    variables: the model's, as floats.
    adapters: from `adapted.init`; the auxiliary and extra do not change.
    gradients: gradients in the adapted kernels, averaged over a few batches:
      from `jax.grad` in the model's `params`, with or without `nn.Partitioned`
      boxes, or from `nnx.grad`, an `nnx.State`. Gradients of other parameters
      are ignored.
    gamma: 16 in the paper; a smaller gamma makes larger factors.

  Returns:
    The variables to train on, with s B A subtracted from the adapted kernels
    (in float32, cast once), and the adapters. The trained adapters belong to
    these variables: merge them into these.

  Raises:
    ValueError: if gamma is not finite and positive, a gradient is missing or
      does not have its kernel's shape, variables or adapters are not the
      model's, or twice a rank is above the smaller side of its weight.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from bilora_jax import LoraSpec, adapt
    >>> from bilora_jax.initializers import lora_ga
    >>> model, x = nn.Dense(6), jnp.ones((2, 4))
    >>> adapted = adapt(model, LoraSpec(rank=2, rslora=True), x)
    >>> variables = model.init(jax.random.key(0), x)
    >>> adapters = adapted.init(jax.random.key(1), variables)
    >>> grads = jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2))(variables)
    >>> base, adapters = lora_ga(
    ...   adapted, variables, adapters, grads['params']
    ... )
    >>> y = adapted.apply(base, adapters, x)
    >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
    True

  References:
    Wang et al, `LoRA-GA: Low-Rank Adaptation with Gradient Approximation
    <https://arxiv.org/abs/2407.05000>`_, 2024, theorems 3.1 and 3.2 and
    algorithm 1.
  """
  if not (math.isfinite(gamma) and gamma > 0):
    raise ValueError(f"gamma is finite and above 0; got {gamma}.")
  _base.check_ranks("lora_ga", adapted, times=2)
  by_path = _by_path(gradients)
  wanted = {
    tuple(path.split("/")): shape for path, shape in adapted.targets.items()
  }
  wrong = [
    f"{'/'.join(path)}: {shape}, got "
    + (str(tuple(by_path[path].shape)) if path in by_path else "none")
    for path, shape in wanted.items()
    if path not in by_path or tuple(by_path[path].shape) != shape
  ]
  if wrong:
    raise ValueError(
      "gradients are nested as the model's parameters are, with an array of "
      f"the shape of each adapted kernel: {'; '.join(wrong)}."
    )

  def start(gradient, rank):
    size_out = gradient.shape[1]
    u, _, vt = _linalg.svd(gradient)
    size = size_out**0.25 / math.sqrt(gamma)
    # The paper's weights are transposed: its V is this u.
    return size * u[:, :rank], size * vt[rank : 2 * rank]

  return _base.start_from(
    adapted,
    variables,
    adapters,
    {path: by_path[path] for path in wanted},
    start,
    rescale=False,
  )


def _by_path(gradients: Any) -> dict[Path, jax.Array]:
  """Arrays by the paths of their parameters."""
  if isinstance(gradients, nnx.State):
    gradients = nnx.to_pure_dict(gradients)
  flat: dict[Any, Any] = traverse_util.flatten_dict(meta.unbox(gradients))
  return {tuple(map(str, path)): leaf for path, leaf in flat.items()}
