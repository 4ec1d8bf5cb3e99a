"""LoRA-GA: a start whose first step is nearest to full fine-tuning's."""

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

  With the gradient of the loss by an (m x n) weight, :math:`G = U S V^\top`,
  in the letters of the paper,

  .. math::
    A = \frac{m^{1/4}}{\sqrt\gamma} V_{:, 1:r}^\top, \qquad
    B = \frac{m^{1/4}}{\sqrt\gamma} U_{:, r+1:2r}, \qquad
    W_0 \leftarrow W_0 - s B A

  so that the first step of the product is the best approximation, of rank 2r,
  of the gradient.

  Args:
    adapted: the model, of a spec with `rslora=True` as in the paper, or of any.
      Of one with `base_dtype` too: what is returned is then to `quantize`.
    variables: of the model, as floats.
    adapters: from `adapted.init`; the auxiliary and extra stay as they are.
    gradients: by the adapted kernels, as `jax.grad` gives them of the model's
      `params`, boxes of `nn.Partitioned` or none, or as `nnx.grad` does, an
      `nnx.State`; the mean over a few batches. Those of others are ignored.
    gamma: of the scale; 16 in the paper. Smaller starts larger.

  Returns:
    The variables to train on, whose adapted kernels are what is left of them
    (in float32, cast once), and the adapters. What is trained belongs to these
    variables: merge it into them.

  Raises:
    ValueError: if gamma is not finite and positive; a gradient is missing or
      not of its kernel's shape; variables or adapters are not the model's; or
      twice a rank is above the smaller side of its weight.

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
  found = _by_path(gradients)
  wanted = {
    tuple(path.split("/")): shape for path, shape in adapted.targets.items()
  }
  wrong = [
    f"{'/'.join(path)}: {shape}, got "
    + (str(tuple(found[path].shape)) if path in found else "none")
    for path, shape in wanted.items()
    if path not in found or tuple(found[path].shape) != shape
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
    # The paper's weights are the transposed: its V is this u.
    return size * u[:, :rank], size * vt[rank : 2 * rank]

  return _base.start_from(
    adapted,
    variables,
    adapters,
    {path: found[path] for path in wanted},
    start,
    rescale=False,
  )


def _by_path(gradients: Any) -> dict[Path, jax.Array]:
  """Arrays by the paths of their parameters."""
  if isinstance(gradients, nnx.State):
    gradients = nnx.to_pure_dict(gradients)
  flat: dict[Any, Any] = traverse_util.flatten_dict(meta.unbox(gradients))
  return {tuple(map(str, path)): leaf for path, leaf in flat.items()}
