"""Kernels in few bits and without small weights, against NumPy in float64."""

from flax import traverse_util
import jax
import numpy as np
import pytest
import qwix

import bilora_jax
from train.data.objectives import CLASSIFICATION
from train.run import compress

KERNEL = np.random.RandomState(0).normal(size=(128, 6)).astype(np.float32)


def _uniform(kernel, bits):
  """Each output channel to whole multiples of its largest magnitude's share."""
  largest = 2 ** (bits - 1) - 1
  exact = kernel.astype(np.float64)
  scale = np.abs(exact).max(0) / largest
  return np.rint(exact / scale) * scale


@pytest.mark.parametrize("bits", [8, 3])
def test_few_bits_are_multiples_of_a_scale_for_each_output_channel(bits):
  found = compress.quantised(KERNEL, f"int{bits}", (128, 1))
  wanted = _uniform(KERNEL, bits)
  # No weight is halfway between two codes, but for float32's rounding.
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  assert all(len(np.unique(x)) <= 2**bits - 1 for x in np.asarray(found).T)
  # The largest magnitude is the largest code, and so it stays what it is.
  np.testing.assert_allclose(
    np.abs(found).max(0), np.abs(KERNEL).max(0), rtol=1e-6
  )


def test_nf4_has_sixteen_levels_for_each_tile_and_takes_the_nearest():
  found = np.asarray(compress.quantised(KERNEL, "nf4", (64, 1)))
  for half in (slice(64), slice(64, None)):
    scale = np.abs(KERNEL[half]).max(0)
    levels = np.unique(np.round(found[half] / scale, 5))
    # QLoRA's, Dettmers et al. 2023, appendix E: the ends, the middle, the next.
    assert len(levels) <= 16 and {-1.0, 0.0, 1.0} <= set(levels)
    assert 0.07958 in levels
    own = KERNEL[half] / scale
    nearest = levels[np.abs(own[..., None] - levels).argmin(-1)]
    np.testing.assert_allclose(found[half] / scale, nearest, atol=2e-5)


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_pruning_takes_the_smallest_share_of_the_weights(share):
  found = np.asarray(compress.pruned(KERNEL, share))
  gone = found == 0
  assert gone.sum() == round(share * KERNEL.size)
  np.testing.assert_array_equal(found[~gone], KERNEL[~gone])
  assert np.abs(KERNEL[gone]).max() <= np.abs(KERNEL[~gone]).min()


def test_all_linear_layers_of_a_model_are_changed_and_nothing_else(prepared):
  # Adapters on some layers: what is served in few bits is the whole model.
  ready = prepared(targets=".*query.*", method="lora")
  inputs = CLASSIFICATION.inputs(next(ready.data.train_batches()))
  changes = compress.changes(ready.model, inputs, ("quantised", "pruned"))
  assert list(changes) == ["int8", "nf4", "int3", "pruned 30%", "pruned 50%"]
  # The library's own int8, as --base-dtype int8 has it, is of tiles of 64: the
  # tiny model has fewer inputs than that, which one scale covers.
  whole = bilora_jax.adapt(
    ready.model,
    bilora_jax.LoraSpec(
      rank=1, alpha=1.0, targets=".*", extra="head/.*", base_dtype="int8"
    ),
    *inputs,
  )
  served = jax.tree.map(
    lambda x: qwix.dequantize(x) if isinstance(x, qwix.QArray) else x,
    whole.quantize(ready.variables),
    is_leaf=lambda x: isinstance(x, qwix.QArray),
  )
  before = _flat(ready.variables)
  for name, change in changes.items():
    after = _flat(change(ready.variables))
    changed = {x for x in before if not np.array_equal(before[x], after[x])}
    assert changed == set(whole.targets) and len(changed) == 6, name
  for path, kernel in _flat(served).items():
    found = _flat(changes["int8"](ready.variables))[path]
    np.testing.assert_allclose(found, kernel, rtol=1e-5, atol=1e-6)


def _flat(variables):
  return traverse_util.flatten_dict(variables["params"], sep="/")
