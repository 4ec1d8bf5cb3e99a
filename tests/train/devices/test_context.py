"""Devices that share the tokens of a row train as one device does."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from train.data.objectives import NEXT_TOKEN
from train.devices import mesh as mesh_lib
from train.errors import UsageError
from train.models.bert import family as bert
from train.models.decoder import config as decoder_config
from train.models.decoder import family as decoder_family
from train.models.decoder import generate
from train.models.decoder import model as decoder
from train.run import assemble, state_shardings, step
from train.run import config as config_lib

# Nothing else of a model is as long.
ROWS, LENGTH, VOCABULARY, STEPS, WINDOW = 4, 20, 32, 4, 5
# Each mesh adds up in another order, to rounding in float32.
TOLERANCE = 1e-5
PACKED = np.array([[6, 9, 5], [20, 0, 0], [3, 4, 0], [11, 9, 0]], np.int32)
PADDED = np.array([[20], [13], [7], [1]], np.int32)
# Windows of the layers, how many tokens the segments of the rows have, and what
# else is said to the model.
CASES = {
  "padded": ((None,), PADDED, {}),
  "packed": ((WINDOW, WINDOW), PACKED, {"scan": True}),
}


def _model(windows, options):
  sizes = decoder_config.DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_layers=len(windows),
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=64,
    windows=windows,
  )
  # Two chunks of the logits of the rows that one device has.
  limit = ROWS * LENGTH * VOCABULARY * 4 // 2
  return decoder.Decoder(sizes, logits_bytes=limit, **options)


def _variables(model):
  tokens = jax.ShapeDtypeStruct((1, 1), "int32")
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: np.float32(rng.normal(size=x.shape) * 0.3), shapes
  )


def _batch(lengths):
  rng = np.random.default_rng(0)
  shape = ROWS, LENGTH
  real = np.arange(LENGTH) < lengths.sum(1, keepdims=True)
  starts = np.cumsum(lengths, 1) - lengths
  of = (np.arange(LENGTH)[:, None] >= starts[:, None]) & (lengths > 0)[:, None]
  first = np.where(of, starts[:, None], 0).max(-1)
  return {
    "tokens": rng.integers(0, VOCABULARY, shape, np.int32),
    "targets": rng.integers(0, VOCABULARY, shape, np.int32),
    "positions": (np.arange(LENGTH) - first).astype(np.int32),
    "lengths": lengths,
    "weights": rng.integers(0, 2, shape) * real.astype(np.float32),
  }


def _layout(text):
  count = int(np.prod([int(x) for x in re.findall(r"\d+", text)]))
  return mesh_lib.make(text, ROWS, jax.devices()[:count])


def _trained(name, text="", accumulate=1, **more):
  """Losses, last adapters and items of some steps, and their program."""
  windows, lengths, options = CASES[name]
  model, layout = _model(windows, options | more), _layout(text)
  batch = _batch(lengths)
  inputs = NEXT_TOKEN.inputs(batch)
  config = config_lib.build(
    {"method": "bilora", "targets": ".*_proj", "rank": 2, "auxiliary_rank": 2}
  )
  method = assemble.method_of(config, model, inputs, STEPS, NEXT_TOKEN)
  variables = _variables(model)
  axes = decoder.logical_axes(variables)
  init = functools.partial(step.init, method)
  state = jax.jit(init)(jax.random.key(1), variables)
  shardings = state_shardings.of(layout, method, axes, variables, state)
  both = None if shardings is None else (shardings, layout.replicated)
  if shardings is not None:
    variables = jax.device_put(variables, layout.shardings(axes, variables))
    state = jax.device_put(state, shardings)
  train_step = step.make_train_step(method, NEXT_TOKEN, both, accumulate)
  placed = layout.rows(batch)
  compiled = layout.within(lambda *args: train_step.lower(*args).compile())(
    variables, state, placed
  )
  losses = []
  for _ in range(STEPS):
    state, metrics = compiled(variables, state, placed)
    losses.append(float(metrics.loss))
  eval_step = step.make_eval_step(method, NEXT_TOKEN, layout.replicated)
  items = layout.within(eval_step)(
    variables, method.evaluated(state.trained), placed
  )
  return losses, jax.device_get(state.trained), items, compiled.as_text()


@pytest.fixture(scope="module")
def on_one_device():
  """What `_trained` returns of a case, once for all meshes."""
  return functools.cache(_trained)


@pytest.mark.parametrize(
  ("name", "text", "more"),
  [
    ("padded", "context=2", {"remat": "base"}),
    ("padded", "data=2,context=2", {"attention": "xla"}),
    (
      "packed",
      "data=2,context=2,tensor=2",
      {"remat": "offload", "accumulate": 2},
    ),
  ],
)
def test_sharing_rows_changes_no_number(on_one_device, name, text, more):
  want_losses, want_adapters, want_items, _ = on_one_device(name)
  losses, adapters, items, program = _trained(name, text, **more)
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE)
  assert abs(want_losses[-1] - want_losses[0]) > 100 * TOLERANCE
  close(losses, want_losses)
  jax.tree.map(close, adapters, want_adapters)
  real = _batch(CASES[name][1])["weights"] > 0
  close(np.asarray(items.losses)[real], np.asarray(want_items.losses)[real])
  # Queries are shared, and keys are not: no device has a square of its own.
  shapes = re.findall(r"\[([\d,]+)\]", program)
  dims = [[int(x) for x in shape.split(",")] for shape in shapes]
  assert any({LENGTH, LENGTH // 2} <= {*shape} for shape in dims)
  assert not any(shape.count(LENGTH) > 1 for shape in dims)


def test_on_one_device_the_square_would_be_seen(on_one_device):
  shapes = re.findall(r"\[([\d,]+)\]", on_one_device("padded")[-1])
  assert any(shape.split(",").count(str(LENGTH)) > 1 for shape in shapes)


def test_generation_says_the_same_where_rows_are_shared():
  model = _model((WINDOW,), {})
  tokens = _batch(PADDED)["tokens"][:, :7]
  variables = _variables(model)
  layout = _layout("context=2")
  placed = jax.device_put(
    variables, layout.shardings(decoder.logical_axes(variables), variables)
  )

  def say(variables):
    apply = functools.partial(model.apply, variables)
    return generate.generate(model, apply, tokens, np.ones_like(tokens), 5)

  np.testing.assert_array_equal(layout.within(say)(placed), say(variables))


@pytest.mark.parametrize(
  ("family", "lengths", "part"),
  [
    (bert.FAMILY, (16, 32), "is only for decoders; got context=2 with a BERT"),
    (decoder_family.FAMILY, (16, 33), "context=2 .* there may be rows of 33"),
  ],
)
def test_rows_that_cannot_be_shared_are_refused(family, lengths, part):
  layout = _layout("data=2,context=2")
  with pytest.raises(UsageError, match=part):
    assemble.check_layout(layout, "none", family, lengths)
  assemble.check_layout(_layout("data=2"), "none", family, lengths)


def test_offload_is_refused_where_devices_reach_no_memory_of_the_host(
  monkeypatch,
):
  check = functools.partial(
    assemble.check_layout, family=decoder_family.FAMILY, lengths=(16,)
  )
  check(mesh_lib.Layout(), "offload")
  monkeypatch.setattr(mesh_lib.Layout, "offloads", False)
  check(mesh_lib.Layout(), "dots")
  with pytest.raises(UsageError, match=r"--remat offload .* do not reach"):
    check(mesh_lib.Layout(), "offload")


def test_processes_may_share_a_row():
  """Each is given all tokens of the rows that its devices have a part of."""

  @dataclasses.dataclass(frozen=True)
  class Device:
    id: int
    process_index: int

  devices = np.array([Device(i, i // 2) for i in range(8)])
  for sizes, parts in (
    ((2, 1, 4, 1), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ((2, 2, 2, 1), [(0, 4), (1, 4), (2, 4), (3, 4)]),
  ):
    mesh = jax.sharding.Mesh(devices.reshape(sizes), mesh_lib.AXES)
    assert [mesh_lib._part(mesh, i) for i in range(4)] == parts
