"""Primary, auxiliary and extra: selecting, labelling, counting, refusing."""

import jax
import jax.numpy as jnp
import optax
import pytest

from bilora_jax import Factors, _partition, count_parameters, primary

PAIR = Factors(jnp.ones((2, 3, 2)), jnp.ones((2, 2, 4)), 0.5)
WHOLE = {
  "primary": {"w": PAIR},
  "auxiliary": {"w": PAIR},
  "extra": {"head": jnp.ones((4, 3)), "bias": jnp.ones(())},
}


def test_primary_drops_the_auxiliary_and_nothing_else():
  kept = primary(WHOLE)
  assert kept == {"primary": WHOLE["primary"], "extra": WHOLE["extra"]}
  assert kept["primary"]["w"] is PAIR
  assert set(WHOLE) == {"primary", "auxiliary", "extra"}  # not changed
  assert primary(kept) == kept


def test_primary_and_extra_share_one_optimizer():
  assert _partition.labels(WHOLE) == {
    "primary": "primary",
    "auxiliary": "auxiliary",
    "extra": "primary",
  }
  assert _partition.labels({"primary": {}}) == {"primary": "primary"}


def test_labels_partition_every_leaf():
  scales = {"primary": optax.scale(2.0), "auxiliary": optax.scale(3.0)}
  tx = optax.partition(scales, _partition.labels)
  updates, _ = tx.update(WHOLE, tx.init(WHOLE), WHOLE)
  means = {part: set(map(float, means_of(updates[part]))) for part in WHOLE}
  assert means == {"primary": {2.0}, "auxiliary": {3.0}, "extra": {2.0}}


def means_of(tree):
  return [jnp.mean(x) for x in jax.tree.leaves(tree)]


def test_count_parameters_counts_arrays_and_shapes():
  counts = {"primary": 28, "auxiliary": 28, "extra": 13}
  assert count_parameters(WHOLE) == counts
  assert count_parameters(jax.eval_shape(lambda: WHOLE)) == counts
  assert count_parameters({"primary": {}}) == {"primary": 0}


@pytest.mark.parametrize(
  "function", [primary, _partition.labels, count_parameters]
)
@pytest.mark.parametrize(
  ("adapters", "message"),
  [
    ({}, r"adapters hold 'primary', .*; got \[\]\."),
    ({"auxiliary": {}}, r"adapters hold 'primary', .*; got \['auxiliary'\]"),
    ({"primary": {}, "head": {}}, r"hold .*; got \['head', 'primary'\]\."),
    ([PAIR], r"adapters are a dict with the parts .*; got a list\."),
    (PAIR, r"adapters are a dict with the parts .*; got a Factors\."),
  ],
  ids=["empty", "no primary", "unknown part", "list", "pair"],
)
def test_what_is_no_partition_is_refused(function, adapters, message):
  with pytest.raises(ValueError, match=message):
    function(adapters)
