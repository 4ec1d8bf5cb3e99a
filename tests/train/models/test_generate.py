"""Generation: what the full forward pass says, padding, sampling, ends."""

import functools

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilora_jax
from train.models.decoder import generate
from train.models.decoder import model as decoder
from train.models.decoder import weights as decoder_weights

TINY = decoder_cases.TINY
COUNT = 8
# Not padded, padded before, padded behind, and both.
TOKENS = np.array(
  [[5, 60, 7, 21, 33, 2], [0, 0, 0, 9, 50, 14], [44, 3, 6, 0, 0, 0], [0, 8] * 3]
)
MASK = np.array([[1] * 6, [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1] * 3])


@functools.cache
def _model(scan=False):
  config, tensors, *_ = decoder_cases.load("llama3_scaled")
  model = decoder.Decoder(config, scan=scan)
  params = decoder_weights.params(config, tensors, scan=scan)
  return model, functools.partial(model.apply, {"params": params})


def _rows(new):
  """Each prompt without its padding, and what was generated after it."""
  for row, keep, added in zip(TOKENS, MASK.astype(bool), np.asarray(new)):
    yield row[keep], np.concatenate([row[keep], added])


def _assert_greedy(apply, new):
  """Each new token is the likeliest after all before it, without a cache."""
  full = jax.jit(apply)
  length = TOKENS.shape[1] + COUNT
  padded = np.zeros((len(TOKENS), length), np.int32)
  rows = list(_rows(new))
  for i, (_, whole) in enumerate(rows):
    padded[i, : len(whole)] = whole
  # What follows a row cannot be seen from it: it is causal.
  likeliest = np.argmax(full(padded), -1)
  for i, (prompt, whole) in enumerate(rows):
    want = likeliest[i, len(prompt) - 1 : len(whole) - 1]
    np.testing.assert_array_equal(whole[len(prompt) :], want)


@pytest.mark.parametrize("scan", [False, True])
def test_greedy_is_the_argmax_of_the_full_forward_pass(scan):
  model, apply = _model(scan)
  new = generate.generate(model, apply, TOKENS, MASK, COUNT)
  assert new.shape == (4, COUNT) and new.dtype == jnp.int32
  _assert_greedy(apply, new)
  # Not one token over and over, which a broken cache could give as well.
  assert min(len(set(row)) for row in np.asarray(new).tolist()) > 2


@pytest.mark.parametrize("name", decoder_cases.NAMES)
def test_padded_prompts_have_the_answers_that_pytorch_gives(name):
  config, tensors, rows, answers = decoder_cases.load(name)
  model = decoder.Decoder(config)
  params = decoder_weights.params(config, tensors)
  apply = functools.partial(model.apply, {"params": params})
  length = max(len(tokens) for tokens, _ in rows)
  tokens, mask = np.zeros((2, len(rows), length), np.int32)
  for i, (row, _) in enumerate(rows):
    # Padding comes before the last row and after the others.
    place = slice(-len(row), None) if i == 2 else slice(len(row))
    tokens[i, place], mask[i, place] = row, 1
  new = generate.generate(model, apply, tokens, mask, len(answers[0]))
  np.testing.assert_array_equal(new, answers)


def test_ragged_prompts_give_what_each_gives_alone():
  model, apply = _model()
  new = generate.generate(model, apply, TOKENS, MASK, COUNT)
  for prompt, whole in list(_rows(new))[1:]:
    alone = prompt[None]
    got = generate.generate(model, apply, alone, np.ones_like(alone), COUNT)
    np.testing.assert_array_equal(got[0], whole[len(prompt) :])


def test_adapters_take_part():
  model, apply = _model()
  spec = bilora_jax.LoraSpec(rank=2, auxiliary_rank=2)
  methods = ("__call__", "decode")
  adapted = bilora_jax.adapt(model, spec, TOKENS, methods=methods)
  variables = apply.args[0]
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype),
    jax.eval_shape(adapted.init, jax.random.key(0), variables),
  )
  changed = functools.partial(adapted.apply, variables, adapters)
  new = generate.generate(model, changed, TOKENS, MASK, COUNT)
  _assert_greedy(changed, new)
  plain = generate.generate(model, apply, TOKENS, MASK, COUNT)
  assert (np.asarray(new) != np.asarray(plain)).mean() > 0.5


def test_bfloat16_keeps_a_cache_of_it():
  model = decoder.Decoder(TINY, dtype=jnp.bfloat16)
  cache = decoder.empty_cache(model, 3, 7)
  assert [x.dtype for x in jax.tree.leaves(cache)] == [jnp.bfloat16] * 4
  assert cache[0][0].shape == (3, 7, TINY.num_kv_heads, TINY.head_dim)
  cache = decoder.empty_cache(decoder.Decoder(TINY, scan=True), 3, 7)
  assert {x.shape for x in cache} == {(2, 3, 7, 2, 4)}


# A language whose probabilities are known.


def _constant(probabilities):
  """Every token is drawn from one distribution."""
  logits = jnp.log(jnp.asarray(probabilities))

  def apply(tokens, positions, mask, cache, start, last, places, method):
    return jnp.broadcast_to(logits, (len(tokens), logits.size)), cache

  return apply


def _counting(tokens, positions, mask, cache, start, last, places, method):
  """Every token is one more than that before it."""
  before = jnp.take_along_axis(tokens, last[:, None], 1)[:, 0]
  return jax.nn.one_hot(before + 1, TINY.vocab_size), cache


PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3] + [1e-9] * 9)


def _frequencies(**kwargs):
  rows = np.zeros((500, 1), int)
  new = generate.generate(
    decoder.Decoder(TINY),
    _constant(PROBABILITIES),
    rows,
    rows + 1,
    8,
    key=jax.random.key(0),
    **kwargs,
  )
  return np.bincount(np.asarray(new).ravel(), minlength=13)[:4] / new.size


@pytest.mark.parametrize(
  ("options", "kept", "power"),
  [
    ({"temperature": 0.5, "top_k": 2}, [1, 3], 2.0),
    # 0.4 and 0.3 do not reach it, with 0.2 they do.
    ({"temperature": 1.0, "top_p": 0.75}, [1, 2, 3], 1.0),
    # Of the top two, the first has 4 in 7.
    ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, [1], 1.0),
  ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(options, kept, power):
  want = np.zeros(4)
  want[kept] = PROBABILITIES[kept] ** power
  want /= want.sum()
  # 4000 draws: three standard deviations are at most 0.024.
  np.testing.assert_allclose(_frequencies(**options), want, rtol=0, atol=0.03)


def test_a_key_gives_the_same_tokens_again_and_another_others():
  model, apply = _model()
  first, again, other = (
    np.asarray(
      generate.generate(
        model,
        apply,
        TOKENS,
        MASK,
        COUNT,
        temperature=1.0,
        key=jax.random.key(seed),
      )
    )
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).mean() > 0.3
  # Nor do steps or rows share their draws.
  assert (first[:, 0] != first[:, 1]).any() and (first[0] != first[1]).any()


def test_the_likeliest_of_one_is_the_greedy_choice():
  model, apply = _model()
  greedy = generate.generate(model, apply, TOKENS, MASK, COUNT)
  drawn = generate.generate(
    model,
    apply,
    TOKENS,
    MASK,
    COUNT,
    temperature=2.0,
    top_k=1,
    key=jax.random.key(0),
  )
  np.testing.assert_array_equal(drawn, greedy)


def test_a_row_that_has_ended_stays_ended():
  tokens = np.array([[0, 2], [4, 0], [7, 5]])
  mask = np.array([[1, 1], [1, 0], [1, 1]])
  model = decoder.Decoder(TINY)
  new = generate.generate(model, _counting, tokens, mask, 5, stop_ids=(5,))
  want = [[3, 4, 5, 5, 5], [5, 5, 5, 5, 5], [6, 7, 8, 9, 10]]
  np.testing.assert_array_equal(new, want)
  # Each row ends with its own token, also where the others have all ended.
  new = generate.generate(model, _counting, tokens, mask, 5, stop_ids=(4, 5, 7))
  want = [[3, 4, 4, 4, 4], [5, 5, 5, 5, 5], [6, 7, 7, 7, 7]]
  np.testing.assert_array_equal(new, want)
  new = generate.generate(model, _counting, tokens, mask, 2)
  np.testing.assert_array_equal(new, [[3, 4], [5, 6], [6, 7]])


ONE = np.ones((1, 3), int)


@pytest.mark.parametrize(
  ("args", "kwargs", "message"),
  [
    ((ONE, ONE, 14), {}, "fit into the 16 positions .* got 3 \\+ 14"),
    ((np.ones((1, 17)), np.ones((1, 17)), 1), {}, "got 17 \\+ 1"),
    ((ONE[0], ONE[0], 1), {}, r"tokens must be \(batch, length\), got \(3,\)"),
    ((ONE, ONE[:, :2], 1), {}, r"mask must have the shape of tokens, \(1, 3\)"),
    ((ONE, 0 * ONE, 1), {}, "row 0 is all padding"),
    ((ONE, ONE, 0), {}, "max_new_tokens must be at least 1, got 0"),
    ((ONE, ONE, 1), {"temperature": -1.0}, "temperature must be at least 0"),
    ((ONE, ONE, 1), {"temperature": 1.0}, "A key must be given"),
    ((ONE, ONE, 1), {"top_k": 14}, "top_k .* vocabulary's 13, got 14"),
    ((ONE, ONE, 1), {"top_p": 0.0}, "top_p must be above 0.* got 0.0"),
  ],
)
def test_what_cannot_be_generated_is_refused(args, kwargs, message):
  with pytest.raises(ValueError, match=message):
    generate.generate(decoder.Decoder(TINY), _counting, *args, **kwargs)
