"""Adapters on disk: to the bit, whole or not at all, every mismatch named."""

import errno
import json
import os
import shutil
import stat

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bilora_jax import (
  LoraSpec,
  adapt,
  load_adapters,
  load_spec,
  primary,
  save_adapters,
)
from bilora_jax._adapted import Adapted

NAMES = ["adapters.json", "adapters.safetensors"]
# The order of the patterns counts, and is not that of the alphabet.
SPEC = LoraSpec(
  rank=2,
  alpha=0.3,
  auxiliary_rank=3,
  targets={"layers_2": {"rank": 1}, "layers_.*": {}, ".*": {"rank": 7}},
  extra="layers_4/.*",
)
X = jnp.ones((1, 4))


def _adapted(spec=SPEC, width=5) -> Adapted:
  layers = [nn.Dense(width), nn.relu, nn.Dense(3), nn.relu, nn.Dense(2)]
  return adapt(nn.Sequential(layers), spec, X)


def _adapters(adapted, seed=0):
  variables = jax.eval_shape(
    nn.Sequential(
      [nn.Dense(5), nn.relu, nn.Dense(3), nn.relu, nn.Dense(2)]
    ).init,
    jax.random.key(0),
    X,
  )
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), variables)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
  )


@pytest.fixture(scope="module")
def adapted():
  return _adapted()


@pytest.fixture(scope="module")
def adapters(adapted):
  return _adapters(adapted)


@pytest.fixture
def folder(tmp_path, adapted, adapters):
  save_adapters(tmp_path / "new" / "folder", adapted, adapters)
  return tmp_path / "new" / "folder"


def _assert_same_bits(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for x, y in zip(*map(jax.tree.leaves, (got, wanted))):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _error(call, *args):
  with pytest.raises(ValueError) as caught:
    call(*args)
  return str(caught.value)


@pytest.mark.parametrize("keep", [dict, primary])
def test_what_was_saved_is_loaded_to_the_bit(tmp_path, adapted, adapters, keep):
  save_adapters(tmp_path, adapted, keep(adapters))
  assert sorted(os.listdir(tmp_path)) == NAMES
  _assert_same_bits(load_adapters(tmp_path, adapted), keep(adapters))


def test_special_values_survive(tmp_path, adapted, adapters):
  values = jax.tree.map(
    lambda x: x.ravel().at[0].set(-0.0).reshape(x.shape), adapters
  )
  values = jax.tree.map(
    lambda x: x.ravel().at[1].set(jnp.nan).reshape(x.shape), values
  )
  save_adapters(tmp_path, adapted, values)
  _assert_same_bits(load_adapters(tmp_path, adapted), values)


def test_a_model_is_rebuilt_from_the_spec_that_was_saved(folder, adapters):
  spec = load_spec(folder)
  assert spec == SPEC
  assert list(spec.targets) == list(SPEC.targets)
  _assert_same_bits(load_adapters(folder, _adapted(spec)), adapters)


@pytest.mark.parametrize(
  "spec",
  [
    LoraSpec(rank=2, targets=("layers_0", "layers_2"), dtype="bfloat16"),
    LoraSpec(rank=2, targets="layers_.", exclude="layers_0", rslora=True),
    LoraSpec(rank=3, alpha=1e-7, dropout=0.1, auxiliary_rank=0),
    LoraSpec(rank=2, tile_size=None),
  ],
)
def test_every_field_of_a_spec_is_kept(tmp_path, spec):
  adapted = _adapted(spec)
  adapters = _adapters(adapted)
  save_adapters(tmp_path, adapted, adapters)
  assert load_spec(tmp_path) == spec
  _assert_same_bits(load_adapters(tmp_path, adapted), adapters)


def test_later_adapters_replace_earlier_ones(folder, adapted):
  later = _adapters(adapted, seed=1)
  save_adapters(folder, adapted, later)
  assert sorted(os.listdir(folder)) == NAMES
  _assert_same_bits(load_adapters(folder, adapted), later)


def test_files_are_plain_and_as_readable_as_any(folder, adapters):
  arrays = safetensors.numpy.load_file(folder / NAMES[1])
  np.testing.assert_array_equal(
    arrays["primary/layers_2/kernel/a"],
    adapters["primary"]["layers_2"]["kernel"].a,
  )
  assert "extra/layers_4/bias" in arrays
  config = json.loads((folder / NAMES[0]).read_text())
  assert config["scales"]["primary/layers_0/kernel"] == 0.15
  (folder / "other").write_bytes(b"")
  mode = stat.S_IMODE((folder / "other").stat().st_mode)
  for name in NAMES:
    assert stat.S_IMODE((folder / name).stat().st_mode) == mode
    # A pickle of protocol 2 or above, or a zip of them.
    assert (folder / name).read_bytes()[:2] not in (b"\x80\x02", b"PK")


# Whole or not at all.


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("successes", [0, 1])
@pytest.mark.parametrize("keep", [dict, primary])
def test_a_failure_leaves_what_can_be_loaded_and_nothing_else(
  folder, adapted, adapters, monkeypatch, function, successes, keep
):
  real, calls = getattr(os, function), []

  def full(*args):
    calls.append(args)
    if len(calls) > successes:
      raise OSError(errno.ENOSPC, "No space left on device")
    return real(*args)

  later = keep(_adapters(adapted, seed=1))
  with monkeypatch.context() as patch:
    patch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left"):
      save_adapters(folder, adapted, later)
  assert len(calls) == successes + 1
  assert sorted(os.listdir(folder)) == NAMES
  # Only the tensors replaced: the new ones, whole, whatever the JSON says.
  half = function == "replace" and successes == 1
  if half and keep is primary:
    with pytest.warns(UserWarning, match="the latter counts"):
      got = load_adapters(folder, adapted)
  else:
    got = load_adapters(folder, adapted)
  _assert_same_bits(got, later if half else adapters)


def test_a_first_save_that_fails_leaves_nothing(
  tmp_path, adapted, adapters, monkeypatch
):
  def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    save_adapters(tmp_path, adapted, adapters)
  assert os.listdir(tmp_path) == []


def test_adapters_of_another_model_are_not_written(tmp_path, adapted, adapters):
  wrong = {**adapters, "primary": adapters["auxiliary"]}
  message = _error(save_adapters, tmp_path / "new", adapted, wrong)
  assert "primary/layers_0/kernel: ((4, 3), (3, 5), 0.15), expected" in message
  assert not (tmp_path / "new").exists()


def test_a_json_of_other_adapters_does_not_count(folder, adapted, adapters):
  config = json.loads((folder / NAMES[0]).read_text())
  config["spec"]["alpha"] = 99.0
  (folder / NAMES[0]).write_text(json.dumps(config))
  for call in (load_spec, lambda f: load_adapters(f, adapted)):
    with pytest.warns(UserWarning, match="is not the configuration that"):
      call(folder)


# Mismatches.


def test_another_spec_is_refused_and_the_difference_named(folder):
  other = LoraSpec(**{**vars(SPEC), "alpha": 4.0, "rslora": True})
  message = _error(load_adapters, folder, _adapted(other))
  assert "alpha is 0.3 there and 4.0 here" in message
  assert "rslora is False there and True here" in message
  assert "extra" not in message


def test_another_exclude_counts_where_it_leaves_out_other_modules(tmp_path):
  saved = _adapted(LoraSpec(rank=2, exclude="layers_0"))
  adapters = _adapters(saved)
  save_adapters(tmp_path, saved, adapters)
  same = _adapted(LoraSpec(rank=2, exclude="layers_[01]"))
  _assert_same_bits(load_adapters(tmp_path, same), adapters)
  message = _error(load_adapters, tmp_path, _adapted(LoraSpec(rank=2)))
  assert "primary/layers_0/kernel: missing" in message


def test_another_order_of_targets_is_refused_where_it_changes_a_rank(folder):
  targets = dict(reversed(SPEC.targets.items()))
  other = LoraSpec(**{**vars(SPEC), "targets": targets})
  assert "do not fit" in _error(load_adapters, folder, _adapted(other))


def test_another_model_is_refused_and_its_shapes_named(folder):
  message = _error(load_adapters, folder, _adapted(width=6))
  assert (
    "primary/layers_0/kernel: ((4, 2), (2, 5), 0.15), expected ((4, 2), (2, 6)"
    in message
  )


@pytest.fixture
def rewrite(folder):
  """Writes the tensors of the folder anew, after a change."""

  def write(change):
    path = folder / NAMES[1]
    arrays = safetensors.numpy.load_file(path)
    text = (folder / NAMES[0]).read_text().strip()
    change(arrays)
    path.write_bytes(safetensors.numpy.save(arrays, {"bilora_jax": text}))
    return folder

  return write


@pytest.fixture
def respecify(folder, rewrite):
  """Writes the folder anew, with another spec in both files."""

  def write(change):
    path = folder / NAMES[0]
    config = json.loads(path.read_text())
    change(config["spec"])
    path.write_text(json.dumps(config))
    return rewrite(lambda arrays: None)

  return write


def test_what_is_newer_than_a_file_is_at_its_default(
  respecify, adapted, adapters
):
  def older(spec):
    for name in ("dora", "base_dtype", "tile_size"):
      del spec[name]

  folder = respecify(older)
  assert load_spec(folder) == SPEC
  _assert_same_bits(load_adapters(folder, adapted), adapters)


def test_a_spec_of_a_later_version_is_refused_and_what_is_new_named(
  respecify, adapted
):
  folder = respecify(lambda spec: spec.update(zora=True, aura=1))
  for call in (load_spec, lambda f: load_adapters(f, adapted)):
    message = _error(call, folder)
    assert message.endswith(
      "that this version does not have: ['aura', 'zora']."
    )


def test_a_missing_tensor_is_named(rewrite, adapted):
  name = "auxiliary/layers_0/kernel/b"
  folder = rewrite(lambda arrays: arrays.pop(name))
  assert _error(load_adapters, folder, adapted).endswith(f"lacks {name}.")


def test_a_missing_extra_is_named(rewrite, adapted):
  folder = rewrite(lambda arrays: arrays.pop("extra/layers_4/bias"))
  message = _error(load_adapters, folder, adapted)
  assert "extra/layers_4/bias: missing, expected (2,)" in message


def test_a_tensor_of_another_shape_is_named(rewrite, adapted):
  name = "primary/layers_2/kernel/a"
  folder = rewrite(lambda arrays: arrays.update({name: arrays[name][:-1]}))
  message = _error(load_adapters, folder, adapted)
  assert "primary/layers_2/kernel: ((4, 1), (1, 3), 0.3), expected" in message


def test_a_tensor_too_many_is_named(rewrite, adapted):
  folder = rewrite(lambda arrays: arrays.update({"extra/x": np.zeros(1)}))
  message = _error(load_adapters, folder, adapted)
  assert "extra/x: (1,), expected nothing" in message


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_tensors_that_are_no_floats_are_refused(rewrite, adapted, dtype):
  name = "primary/layers_2/kernel/a"
  folder = rewrite(
    lambda arrays: arrays.update({name: arrays[name].astype(dtype)})
  )
  message = _error(load_adapters, folder, adapted)
  assert f"as adapters are: {name} is of {dtype}" in message


@pytest.mark.parametrize(
  "pattern", ["(a+)+$", "([a-z_0-9/]+)+!", "(layers_.|.*)*(.*)*!"]
)
def test_no_pattern_of_a_file_takes_long(respecify, pattern):
  folder = respecify(lambda spec: spec.update(targets=pattern, extra=pattern))
  spec = load_spec(folder)
  path = "encoder/layers_0/attention/self/query/" + "a" * 40
  assert not spec.match(f"{path}!?") and not spec.is_extra(f"{path}!?")


@pytest.mark.parametrize("pattern", ["[", r"(.)\1", "a++", 3, ["a", 3], [[]]])
def test_a_pattern_of_a_file_that_is_none_is_refused(respecify, pattern):
  folder = respecify(lambda spec: spec.update(exclude=pattern))
  assert "is not a regular expression" in _error(load_spec, folder)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_tensors_are_refused(folder, adapted, size):
  path = folder / NAMES[1]
  path.write_bytes(path.read_bytes()[:size])
  message = _error(load_adapters, folder, adapted)
  assert message.startswith(f"{path} is not a whole safetensors file: ")


def test_tensors_of_another_program_are_refused(folder, adapted):
  path = folder / NAMES[1]
  path.write_bytes(safetensors.numpy.save({"x": np.zeros(1)}))
  message = _error(load_adapters, folder, adapted)
  assert message == f"{path} was not written by save_adapters."


@pytest.mark.parametrize("text", ["", "{", '{"version": 1, "spec"', "\x80"])
def test_bad_json_is_refused(folder, adapted, text):
  (folder / NAMES[0]).write_bytes(text.encode("latin1"))
  for call in (load_spec, lambda f: load_adapters(f, adapted)):
    assert f"{folder / NAMES[0]} is not JSON: " in _error(call, folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"version": 1}'])
def test_json_of_something_else_is_refused(folder, text):
  (folder / NAMES[0]).write_text(text)
  message = _error(load_spec, folder)
  assert "is not a configuration of adapters of version 1" in message


def test_another_version_is_refused_and_named(folder, adapted):
  config = json.loads((folder / NAMES[0]).read_text())
  (folder / NAMES[0]).write_text(json.dumps({**config, "version": 2}))
  for call in (load_spec, lambda f: load_adapters(f, adapted)):
    assert _error(call, folder).endswith("its version is 2.")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder, adapted, name):
  (folder / name).unlink()
  wanted = f"{folder / name} is missing."
  assert _error(load_adapters, folder, adapted) == wanted
  shutil.rmtree(folder)
  assert "adapters.json is missing." in _error(load_spec, folder)
