"""Greedy decoding of a T5: the likeliest tokens for each source."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from . import model as t5


def greedy(
  model: t5.T5,
  apply: Callable[..., Any],
  tokens: typing.ArrayLike,
  mask: typing.ArrayLike,
  max_new_tokens: int,
  *,
  temperature: float = 0.0,
  **_: Any,
) -> jax.Array:
  """Answers each source of a batch.

  One program reads the sources and then decodes token by token, until every
  row has ended or is full. It is compiled once for its shapes.

  Args:
    model: the model, which gives the sizes of the cache.
    apply: calls the model with `method='encode'` or 'decode'. It is
      `functools.partial(model.apply, variables)`, or
      `functools.partial(adapted.apply, variables, adapters)` if `adapt` got
      `methods=('__call__', 'encode', 'decode')`. Arrays in the partial are
      arguments of the program; other arrays become constants.
    tokens: the sources, int (B, S), padded on either side.
    mask: 1 or True at a real token, 0 or False at padding, (B, S).
    max_new_tokens: T, the most tokens of an answer.
    temperature: must be 0, because nothing is drawn. Further options of a draw
      are ignored.

  Returns:
    The new tokens, int32 (B, T); after `config.eos_id`, a row repeats it.

  Raises:
    ValueError: a shape is wrong, a source is empty, `max_new_tokens` is not
      positive, or `temperature` is not 0.
  """
  if temperature:
    raise ValueError(
      "A T5 answers with its likeliest tokens, at --temperature 0; got "
      f"{temperature}."
    )
  tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, bool)
  _check(tokens, mask, max_new_tokens)
  if not isinstance(apply, functools.partial):
    apply = functools.partial(apply)
  # As a pytree, the variables are leaves and not constants of the program.
  call = jax.tree_util.Partial(apply.func, *apply.args, **apply.keywords)
  return _greedy(call, tokens, mask, model, max_new_tokens)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _greedy(
  call: Callable[..., Any],
  tokens: jax.Array,
  mask: jax.Array,
  model: t5.T5,
  count: int,
) -> jax.Array:
  batch, end = len(tokens), model.config.eos_id

  def run(new_B, cache, number, source=None):
    logits_BxV, cache = call(
      new_B[:, None], mask, cache, number, source, method="decode"
    )
    return jnp.argmax(logits_BxV, -1).astype(jnp.int32), cache

  new_B, cache = run(
    jnp.full(batch, model.config.pad_id, jnp.int32),
    t5.empty_cache(model, batch, count),
    jnp.int32(0),
    call(tokens, mask, method="encode"),
  )
  out_BxT = jnp.full((batch, count), end, jnp.int32).at[:, 0].set(new_B)

  def more(carry):
    number, new_B, _, _ = carry
    return (number < count) & (new_B != end).any()

  def step(carry):
    number, old_B, out_BxT, cache = carry
    new_B, cache = run(old_B, cache, number)
    # A row that has ended repeats its last token.
    new_B = jnp.where(old_B == end, end, new_B)
    return number + 1, new_B, out_BxT.at[:, number].set(new_B), cache

  start = (jnp.int32(1), new_B, out_BxT, cache)
  return jax.lax.while_loop(more, step, start)[2]


def _check(tokens: np.ndarray, mask: np.ndarray, count: int) -> None:
  if tokens.ndim != 2 or not tokens.size:
    raise ValueError(f"tokens must be (batch, length), got {tokens.shape}.")
  if mask.shape != tokens.shape:
    raise ValueError(
      f"mask must have the shape of tokens, {tokens.shape}, got {mask.shape}."
    )
  if not mask.any(1).all():
    raise ValueError(
      "Every source must have a token, such as the one that ends a text; row "
      f"{int(np.argmin(mask.any(1)))} is all padding."
    )
  if count < 1:
    raise ValueError(f"max_new_tokens must be at least 1, got {count}.")
