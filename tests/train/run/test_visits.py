"""A method whose batches come several times in a row; nothing is compiled."""

import dataclasses

import numpy as np
import pytest

from train.data import scores
from train.run import journal, loop, step

METHODS = {"lora": 1, "nystroem_bilora": 2}


@dataclasses.dataclass
class Kept:
  """What the loop would resume from."""

  loop: dict

  def save_best(self, step, evaluated):
    pass

  def save_last(self, step, state, loop):
    self.loop = loop


def _state(at):
  return step.TrainState(
    step=np.int32(at),
    trained={"primary": {}},
    opt_state={"total_notfinite": 0},
    estimator=(),
    key=np.zeros(2, np.uint32),
  )


def _tokens_of(prepared, stops_at):
  """The tokens that each step meets, in calls that end at these steps."""
  met, kept, at = [], Kept({}), 0

  def train_step(variables, state, batch):
    met.append(np.array(batch["tokens"]))
    one = np.float32(1)
    metrics = step.Metrics(one, one, np.int32(0), np.int32(1), one, one)
    return state._replace(step=state.step + 1), metrics

  def predict(evaluated, split):
    return scores.Evaluation({"accuracy": 0.5}, 0.7, 1, 2)

  for stop in stops_at:
    found = loop.train(
      prepared,
      loop.Programs(train_step, predict),
      loop.Sinks(
        journal.Journal(), kept, 1, lambda logs, stop=stop: len(met) == stop
      ),
      _state(at),
      kept.loop or None,
    )
    at = int(found.state.step)
  return met


@pytest.mark.parametrize("method", METHODS)
def test_batches_come_as_often_as_the_method_says(prepared, method):
  ready = prepared(method=method)
  visits = METHODS[method]
  met = _tokens_of(ready, [ready.steps])
  assert len(met) == ready.steps == 24
  batches = [batch["tokens"] for batch in ready.data.train_batches()]
  for t, tokens in enumerate(met):
    np.testing.assert_array_equal(tokens, batches[t // visits])


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_resumes_between_the_visits(prepared, method):
  ready = prepared(method=method)
  whole = _tokens_of(ready, [ready.steps])
  # Behind the first visit of a batch, behind the second, and at once again.
  in_parts = _tokens_of(ready, [3, 8, 9, 10, ready.steps])
  assert len(in_parts) == len(whole)
  for one, other in zip(in_parts, whole):
    np.testing.assert_array_equal(one, other)
