"""Activations of feed-forward layers, by transformers' names."""

from collections.abc import Callable
import functools
from typing import Any

import jax

from .. import options

BY_NAME: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}


def check(key: str, name: Any) -> None:
  """Refuses an activation that is not one of `BY_NAME`.

  Args:
    key: the key in config.json.
    name: the value of this key.

  Raises:
    ValueError: if the activation is unknown; the message names the key.
  """
  if name not in tuple(BY_NAME):
    raise ValueError(
      f"{key} must be one of {', '.join(BY_NAME)}, got {options.shown(name)}."
    )
