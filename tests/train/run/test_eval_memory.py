"""What an evaluation takes, by the compiler's plan."""

import dataclasses

import jax
import pytest

from train import presets
from train.data.objectives import NEXT_TOKEN
from train.devices import mesh as mesh_lib
from train.models.decoder import model as decoder
from train.models.decoder import sizes
from train.run import assemble, lowering


@pytest.fixture(scope="module")
def steps():
  """Bytes of temporary arrays of a step, training's and by evaluated rows.

  Rows, lengths and vocabulary are the preset's; the layers are few and narrow,
  as most is of the logits.
  """
  config = presets.get("llama3.1-8b-alpaca")
  small = dataclasses.replace(
    sizes.PRESETS["llama3.1-8b"],
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=32,
  )
  model = decoder.Decoder(small, dtype="bfloat16", remat="full")
  rows, length = config.optimisation.batch_size, config.data.max_length
  batch = lowering.next_token_batch(rows, length)
  inputs = NEXT_TOKEN.inputs(batch)
  method = assemble.method_of(config, model, inputs, 100, NEXT_TOKEN)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  layout = mesh_lib.Layout()
  variables, state = lowering.abstract(
    config, method, layout, shapes, decoder.logical_axes(shapes)
  )

  def temporaries(lowered):
    return lowered.compile().memory_analysis().temp_size_in_bytes

  def evaluation(rows):
    batch = lowering.next_token_batch(rows, length)
    return temporaries(
      lowering.lower_eval(layout, method, NEXT_TOKEN, variables, state, batch)
    )

  training = temporaries(
    lowering.lower(
      layout,
      method,
      NEXT_TOKEN,
      variables,
      state,
      batch,
      config.optimisation.accumulate,
    )
  )
  return training, evaluation, rows * length * small.vocab_size * 4


def test_evaluation_needs_less_than_training_at_the_preset_s_shapes(steps):
  training, evaluation, logits = steps
  rows = assemble.eval_rows(presets.get("llama3.1-8b-alpaca"))
  assert rows == 4
  assert evaluation(rows) < training
  # Nor does a whole batch hold its logits at once.
  assert evaluation(128) < logits
