"""Generates tokens after a prompt, with a cache of keys and values."""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from . import model as decoder

_NONE = -1  # not the id of any token


def generate(
  model: decoder.Decoder,
  apply: Callable[..., Any],
  tokens: typing.ArrayLike,
  mask: typing.ArrayLike,
  max_new_tokens: int,
  *,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  key: jax.Array | None = None,
  stop_ids: tuple[int, ...] = (),
) -> jax.Array:
  """Continues each prompt of a batch.

  One program reads the prompts and then decodes token by token, until every
  row has ended or is full. It is compiled once for its shapes and options.

  Args:
    model: the model, which gives the sizes of the cache.
    apply: calls the model with `method='decode'`. It is
      `functools.partial(model.apply, variables)`, or
      `functools.partial(adapted.apply, variables, adapters)` if `adapt` got
      `methods=('__call__', 'decode')`. Arrays in the partial are arguments of
      the program; other arrays become constants.
    tokens: the prompts, int (B, L), padded on either side.
    mask: 1 or True at a real token, 0 or False at padding, (B, L).
    max_new_tokens: T, the number of tokens to add.
    temperature: the temperature of the softmax that tokens are drawn from; 0
      takes the likeliest token.
    top_k: draws from the likeliest k tokens; 0: from all.
    top_p: draws from the likeliest tokens whose probabilities reach p (Holtzman
      et al., arXiv 1904.09751), within the top k.
    key: the JAX random key of the draws.
    stop_ids: the tokens that end a row. A row that has ended repeats its last
      token.

  Returns:
    The new tokens, int32 (B, T).

  Raises:
    ValueError: a shape or an option is out of bounds, a prompt is empty, or a
      row would exceed the model's positions.
  """
  tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, bool)
  _check(model, tokens, mask, max_new_tokens)
  sampling = _Sampling(float(temperature), top_k, float(top_p))
  _check_sampling(sampling, model.config.vocab_size, key)
  if not isinstance(apply, functools.partial):
    apply = functools.partial(apply)
  # As a pytree, the variables are leaves and not constants of the program.
  call = jax.tree_util.Partial(apply.func, *apply.args, **apply.keywords)
  if key is None:
    key = jax.random.key(0)  # unused, because nothing is drawn
  return _generate(
    call, tokens, mask, key, model, max_new_tokens, sampling, stop_ids
  )


class _Sampling(NamedTuple):
  temperature: float
  top_k: int
  top_p: float


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _generate(
  call: Callable[..., Any],
  tokens: jax.Array,
  mask: jax.Array,
  key: jax.Array,
  model: decoder.Decoder,
  count: int,
  sampling: _Sampling,
  stop_ids: tuple[int, ...],
) -> jax.Array:
  batch, length = tokens.shape
  # The model does not read the last new token.
  slots = jnp.arange(length + count - 1)
  real_BxS = jnp.pad(mask, ((0, 0), (0, count - 1)), constant_values=True)
  places_BxS = jnp.maximum(jnp.cumsum(real_BxS, 1) - 1, 0)

  def run(tokens, positions, columns, cache, last):
    # A token sees real tokens that are not later. Padding sees itself, so that
    # its softmax has a term.
    seen_BxLxS = real_BxS[:, None] & (slots <= columns[:, None])
    return call(
      tokens,
      positions,
      seen_BxLxS | (slots == columns[:, None]),
      cache,
      columns[0],
      last,
      places_BxS,
      method="decode",
    )

  def pick(logits, number):
    return _pick(logits, jax.random.fold_in(key, number), sampling)

  logits_BxV, cache = run(
    tokens,
    places_BxS[:, :length],
    slots[:length],
    decoder.empty_cache(model, batch, slots.size),
    length - 1 - jnp.argmax(mask[:, ::-1], 1),
  )
  lengths_B = mask.sum(1)
  new_B = pick(logits_BxV, 0)
  out_BxT = jnp.full((batch, count), _NONE).at[:, 0].set(new_B)

  def ended(new_B):
    return jnp.isin(new_B, jnp.asarray(stop_ids, jnp.int32))

  def more(carry):
    number, new_B, _, _ = carry
    return (number < count) & ~ended(new_B).all()

  def step(carry):
    number, new_B, out_BxT, cache = carry
    logits_BxV, cache = run(
      new_B[:, None],
      (lengths_B + number - 1)[:, None],
      (length + number - 1)[None],
      cache,
      jnp.zeros(batch, jnp.int32),
    )
    # A row that has ended repeats its last token.
    new_B = jnp.where(ended(new_B), new_B, pick(logits_BxV, number))
    out_BxT = out_BxT.at[:, number].set(new_B)
    return number + 1, new_B, out_BxT, cache

  start = (jnp.int32(1), new_B, out_BxT, cache)
  _, last_B, out_BxT, _ = jax.lax.while_loop(more, step, start)
  return jnp.where(out_BxT == _NONE, last_B[:, None], out_BxT)


def _pick(
  logits_BxV: jax.Array, key: jax.Array, sampling: _Sampling
) -> jax.Array:
  """Returns a token for each row, int32 (B,)."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BxV, -1).astype(jnp.int32)
  logits_BxV /= sampling.temperature
  if sampling.top_k == 0 and sampling.top_p == 1:
    return jax.random.categorical(key, logits_BxV).astype(jnp.int32)
  logits_BxK, tokens_BxK = jax.lax.top_k(
    logits_BxV, sampling.top_k or logits_BxV.shape[-1]
  )
  probs_BxK = jax.nn.softmax(logits_BxK)
  # The likeliest token is always kept, as no probability comes before it.
  before_BxK = jnp.cumsum(probs_BxK, -1) - probs_BxK
  logits_BxK = jnp.where(before_BxK < sampling.top_p, logits_BxK, -jnp.inf)
  choice_B = jax.random.categorical(key, logits_BxK)
  return jnp.take_along_axis(tokens_BxK, choice_B[:, None], 1)[:, 0]


def _check(
  model: decoder.Decoder, tokens: np.ndarray, mask: np.ndarray, count: int
) -> None:
  if tokens.ndim != 2 or not tokens.size:
    raise ValueError(f"tokens must be (batch, length), got {tokens.shape}.")
  if mask.shape != tokens.shape:
    raise ValueError(
      f"mask must have the shape of tokens, {tokens.shape}, got {mask.shape}."
    )
  if count < 1:
    raise ValueError(f"max_new_tokens must be at least 1, got {count}.")
  lengths = mask.sum(1)
  if not lengths.all():
    raise ValueError(
      "Every prompt must have a token, such as the one that begins a text; "
      f"row {int(np.argmin(lengths))} is all padding."
    )
  longest, limit = int(lengths.max()), model.config.max_positions
  if longest + count > limit:
    raise ValueError(
      f"A prompt and max_new_tokens must fit into the {limit} positions that "
      f"this decoder was made for, got {longest} + {count}."
    )


def _check_sampling(
  sampling: _Sampling, vocab_size: int, key: jax.Array | None
) -> None:
  temperature, top_k, top_p = sampling
  if not 0 <= temperature < math.inf:
    raise ValueError(f"temperature must be at least 0, got {temperature}.")
  if not 0 <= top_k <= vocab_size:
    raise ValueError(
      f"top_k must be from 0, for all, to the vocabulary's {vocab_size}, got "
      f"{top_k}."
    )
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}.")
  if temperature and key is None:
    raise ValueError("A key must be given to draw at a temperature above 0.")
