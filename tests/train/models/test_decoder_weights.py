"""A decoder's weights: read leaf by leaf, placed on meshes, and refused."""

import collections
import dataclasses
import functools
import json
import math

import decoder_cases
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st_numpy

from train.models.decoder import model as decoder
from train.models.decoder import rope
from train.models.decoder import weights as decoder_weights
from train.models.io import stored, tensors, weights

NAME = "qwen2"  # untied, with biases: it has every kind of parameter
RULES = (("embed", "x"), ("vocab", "x"), ("heads", "y"), ("mlp", "y"))


@dataclasses.dataclass
class Counted:
  """A tensor that notes how many values are read at a time."""

  tensor: tensors.Tensor
  reads: list[int]

  @property
  def shape(self):
    return self.tensor.shape

  @property
  def dtype(self):
    return self.tensor.dtype

  def __getitem__(self, index):
    part = self.tensor[index]
    self.reads.append(part.size)
    return part


@pytest.fixture
def counted():
  reads = collections.defaultdict(list)
  found = decoder_cases.load(NAME).tensors
  return {name: Counted(t, reads[name]) for name, t in found.items()}, reads


def _params(**kwargs):
  config, found, *_ = decoder_cases.load(NAME)
  return decoder_weights.params(config, found, **kwargs)


@functools.cache
def _whole(scan):
  return _params(scan=scan)


def _mesh():
  axes = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((4, 2), ("x", "y"), axes)


def _placing(scan):
  """A `place` that puts each parameter on a mesh by the names of its axes."""
  config = decoder_cases.load(NAME).config
  model = decoder.Decoder(config, scan=scan)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
  axes = decoder.logical_axes(shapes["params"])
  flat = traverse_util.flatten_dict(axes)
  mesh = _mesh()

  def place(path, shape, dtype, read):
    spec = nn.logical_to_mesh_axes(flat[path], RULES)
    # The vocabulary of 67 is not to be divided.
    names = [n if d % 4 == 0 else None for n, d in zip(spec, shape)]
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*names)
    )
    return jax.make_array_from_callback(shape, sharding, read)

  return place


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_are_those_that_the_model_makes(scan):
  config = decoder_cases.load(NAME).config
  model = decoder.Decoder(config, scan=scan)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
  got = jax.tree.map(lambda x: (x.shape, x.dtype), _whole(scan))
  assert got == jax.tree.map(lambda x: (x.shape, x.dtype), shapes["params"])


def test_kernels_are_transposed_and_scanned_ones_stacked():
  file = decoder_cases.DATA / NAME / "model.safetensors"
  plain = st_numpy.load_file(file)
  up = [plain[f"model.layers.{i}.mlp.up_proj.weight"].T for i in (0, 1)]
  kernel = _whole(False)["layers_1"]["mlp"]["up_proj"]["kernel"]
  np.testing.assert_array_equal(kernel, up[1])
  whole = decoder_cases.stacked(_whole(False), 2)
  np.testing.assert_array_equal(
    whole["layers"]["mlp"]["up_proj"]["kernel"], np.stack(up)
  )
  jax.tree.map(np.testing.assert_array_equal, whole, _whole(True))


@pytest.mark.parametrize("scan", [False, True])
def test_a_mesh_gets_each_part_of_the_whole(scan):
  placed = _params(scan=scan, place=_placing(scan))
  jax.tree.map(np.testing.assert_array_equal, placed, _whole(scan))
  sharded = [x for x in jax.tree.leaves(placed) if not x.is_fully_replicated]
  assert len(sharded) >= 7


def test_no_read_is_larger_than_a_part_of_one_layers_tensor(counted):
  found, reads = counted
  config = decoder_cases.load(NAME).config
  decoder_weights.params(config, found, scan=True, place=_placing(True))
  for name, tensor in found.items():
    assert 0 < max(reads[name]) <= math.prod(tensor.shape)
  # The feed-forward's are split over both axes of the mesh, 4 and 2.
  for name in ("up_proj", "gate_proj", "down_proj"):
    assert set(reads[f"model.layers.1.mlp.{name}.weight"]) == {32 * 40 // 8}


def test_nothing_is_read_but_what_place_asks_for(counted):
  found, reads = counted
  config = decoder_cases.load(NAME).config
  made = decoder_weights.params(
    config, found, dtype=jnp.bfloat16, place=lambda *args: args
  )
  assert not any(reads.values())
  path, shape, dtype, read = made["layers_1"]["mlp"]["down_proj"]["kernel"]
  assert path == ("layers_1", "mlp", "down_proj", "kernel")
  assert shape == (40, 32) and dtype == jnp.bfloat16
  part = read((slice(3, 5), slice(None)))
  assert part.shape == (2, 32) and part.dtype == jnp.bfloat16
  assert {name: sizes for name, sizes in reads.items() if sizes} == {
    "model.layers.1.mlp.down_proj.weight": [64]
  }


def test_a_dtype_is_that_of_every_parameter():
  got = _params(dtype=jnp.bfloat16)
  want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _whole(False))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_arrays_of_the_host_are_placed_alike():
  tree = jax.tree.map(np.asarray, _whole(False))
  got = stored.placed(tree, jnp.bfloat16, _placing(False))
  want = _params(dtype=jnp.bfloat16, place=_placing(False))

  def same(x, y):
    assert x.sharding == y.sharding
    np.testing.assert_array_equal(x, y)

  jax.tree.map(same, got, want)


# What does not fit.


def _changed(case, **changes):
  """The tensors, some of them changed or, with None, taken out."""
  found = dict(case.tensors)
  for name, value in changes.items():
    name = name.replace("__", ".")
    if value is None:
      del found[name]
    else:
      found[name] = value
  return found


def test_all_faults_are_named_together_and_nothing_is_placed():
  case = decoder_cases.load(NAME)
  found = _changed(
    case,
    model__norm__weight=None,
    lm_head__weight=np.zeros((67, 31)),
    model__layers__2__mlp__up_proj__weight=np.zeros((40, 32)),
    score__weight=np.zeros(3),
  )
  with pytest.raises(weights.WeightsError) as error:
    decoder_weights.params(case.config, found, place=lambda *_: pytest.fail())
  for part in (
    "model.norm.weight is missing",
    "lm_head.weight has shape (67, 31), expected (67, 32)",
    "model.layers.2.mlp.up_proj.weight has no place in it",
    "score.weight has no place in it",
  ):
    assert part in str(error.value)


_BUFFERS = (
  "model__layers__0__self_attn__rotary_emb__inv_freq",
  "model__rotary_emb__inv_freq",
)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_a_tied_head_and_old_buffers_may_be_there(dtype):
  case = decoder_cases.load("llama3_scaled")
  config = dataclasses.replace(case.config, tied=True)
  table = np.asarray(case.tensors["model.embed_tokens.weight"][:, :])
  plain = rope.frequencies(config.rope_theta, config.head_dim)
  scaled = config.rope_scaling.frequencies(config.rope_theta, config.head_dim)
  assert not np.allclose(plain, scaled, rtol=0.1)
  buffers = dict(zip(_BUFFERS, [plain.astype(dtype), scaled.astype(dtype)]))
  without = _changed(case, lm_head__weight=None)
  got = decoder_weights.params(
    config, _changed(case, lm_head__weight=table, **buffers)
  )
  assert set(got) == {"embed_tokens", "norm", "layers_0", "layers_1"}
  want = decoder_weights.params(config, without)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  with pytest.raises(weights.WeightsError, match="lm_head"):
    decoder_weights.params(case.config, without)


@pytest.mark.parametrize("name", _BUFFERS)
@pytest.mark.parametrize("factor", [0.0, 1.1])
def test_buffers_of_other_frequencies_are_refused(name, factor):
  case = decoder_cases.load(NAME)
  config = case.config
  buffer = factor * rope.frequencies(config.rope_theta, config.head_dim)
  with pytest.raises(weights.WeightsError, match="holds other rotary freq"):
    decoder_weights.check(config, _changed(case, **{name: buffer}))


def test_a_head_that_is_not_the_embedding_is_untied_and_said():
  case = decoder_cases.load(NAME)
  tied = dataclasses.replace(case.config, tied=True)
  untied, notes = decoder_weights.with_own_head(tied, case.tensors)
  assert untied == case.config
  assert "lm_head.weight is not the embedding" in notes[0]
  with pytest.raises(weights.WeightsError, match="is not the embedding"):
    decoder_weights.check(tied, case.tensors)
  # One value of the last row is enough; another dtype of the same is not.
  table = np.array(case.tensors["model.embed_tokens.weight"][:, :])
  table = table.astype(jnp.bfloat16)
  same = {"model.embed_tokens.weight": table, "lm_head.weight": table.copy()}
  single = {**same, "lm_head.weight": table.astype(np.float32)}
  for found in (same, single):
    assert decoder_weights.with_own_head(tied, found) == (tied, ())
  same["lm_head.weight"][-1, -1] += 1
  assert decoder_weights.with_own_head(tied, same)[0] == untied


@pytest.mark.parametrize(
  "name", ["gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
)
def test_a_part_for_images_is_left_out_said_and_carried_into_exports(name):
  config, found, *_ = decoder_cases.load(name)
  (note,) = decoder_weights.left_out(config, found)
  assert "images is not read" in note
  params = decoder_weights.params(config, found)
  carried = decoder_weights.carried(config, found)
  written = decoder_weights.tensors(config, params) | carried
  # transformers 5 writes older names of some, and reads both.
  names = {_with_images(name): name for name in found}
  if config.tied:
    names.pop("lm_head.weight", None)
  assert written.keys() == names.keys()
  for new, value in written.items():
    np.testing.assert_array_equal(value, found[names[new]][...])
  again = decoder_weights.params(config, written)
  jax.tree.map(np.testing.assert_array_equal, again, params)


# Of older names -> those of transformers 5, which reads both; the first fits.
_NEW_NAMES = {
  "lm_head.": "lm_head.",
  "visual.": "model.visual.",
  "vision_tower.": "model.vision_tower.",
  "multi_modal_projector.": "model.multi_modal_projector.",
  "language_model.model.": "model.language_model.",
  "model.visual.": "model.visual.",
  "model.language_model.": "model.language_model.",
  "model.": "model.language_model.",
}


def _with_images(name):
  old, new = next(x for x in _NEW_NAMES.items() if name.startswith(x[0]))
  return new + name.removeprefix(old)


def test_qwens_of_new_names_are_read_as_those_of_old_ones():
  config, found, *_ = decoder_cases.load("qwen2_5_vl")
  assert {"model.norm.weight", "visual.patch_embed.proj.weight"} <= found.keys()
  new = {_with_images(name): x for name, x in found.items()}
  assert "model.language_model.norm.weight" in new
  for read in (decoder_weights.params, decoder_weights.carried):
    jax.tree.map(
      np.testing.assert_array_equal, read(config, new), read(config, found)
    )


def test_of_a_model_without_images_nothing_is_carried():
  config, found, *_ = decoder_cases.load("gemma3_text")
  assert decoder_weights.left_out(config, found) == ()
  assert decoder_weights.carried(config, found) == {}


def test_masks_of_an_old_gpt2_are_read_over_and_others_refused():
  config, found, *_ = decoder_cases.load("gpt2")
  mask = np.tri(config.max_positions, dtype=np.float32)[None, None]
  old = {name.removeprefix("transformer."): x for name, x in found.items()}
  buffers = {"h.0.attn.bias": mask, "h.1.attn.masked_bias": np.array(-1e4)}
  jax.tree.map(
    np.testing.assert_array_equal,
    decoder_weights.params(config, {**old, **buffers}),
    decoder_weights.params(config, found),
  )
  for wrong in (
    {"h.0.attn.bias": np.ones_like(mask)},
    {"h.0.attn.bias": mask[..., :3]},
    {"h.0.attn.masked_bias": np.array(0.0)},
  ):
    with pytest.raises(weights.WeightsError, match="mask of a causal decoder"):
      decoder_weights.check(config, {**old, **wrong})


def test_names_of_a_model_without_its_head_are_read():
  case = decoder_cases.load(NAME)
  config = dataclasses.replace(case.config, tied=True)
  whole = _changed(case, lm_head__weight=None)
  bare = {name.removeprefix("model."): x for name, x in whole.items()}
  jax.tree.map(
    np.testing.assert_array_equal,
    decoder_weights.params(config, bare),
    decoder_weights.params(config, whole),
  )


# Files.


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  return {
    "a": rng.normal(size=(5, 3)).astype(np.float32),
    "b": rng.normal(size=(4,)).astype(jnp.bfloat16),
    "c": np.array(2.0, np.float16),
  }


def _shard(folder, arrays):
  st_numpy.save_file({"a": arrays["a"]}, folder / "one.safetensors")
  rest = {name: arrays[name] for name in "bc"}
  st_numpy.save_file(rest, folder / "two.safetensors")
  shards = {"a": "one.safetensors", **dict.fromkeys("bc", "two.safetensors")}
  _index(folder, shards)


def _index(folder, shards):
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize("sharded", [False, True])
def test_parts_of_tensors_are_those_of_the_arrays(tmp_path, arrays, sharded):
  if sharded:
    _shard(tmp_path, arrays)
  else:
    st_numpy.save_file(arrays, tmp_path / "model.safetensors")
  found = tensors.open_safetensors(tmp_path)
  assert set(found) == set(arrays)
  for name, array in arrays.items():
    assert found[name].shape == array.shape
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(tensors.read_all(found)[name], array)
  part = (slice(1, 4), slice(2, None))
  np.testing.assert_array_equal(found["a"][part], arrays["a"][part])


def test_values_are_read_when_they_are_indexed(tmp_path, arrays):
  path = tmp_path / "model.safetensors"
  st_numpy.save_file(arrays, path)
  tensor = tensors.open_safetensors(tmp_path)["a"]
  other = {**arrays, "a": arrays["a"] + 1}
  st_numpy.save_file(other, tmp_path / "other.safetensors")
  with path.open("r+b") as file:
    file.write((tmp_path / "other.safetensors").read_bytes())
  everything = (slice(None), slice(None))
  np.testing.assert_array_equal(tensor[everything], other["a"])


def _cut(folder, arrays):
  path = folder / "model.safetensors"
  st_numpy.save_file(arrays, path)
  path.write_bytes(path.read_bytes()[:-1])


def _empty(folder, arrays):
  (folder / "model.safetensors").touch()


def _pickled(folder, arrays):
  (folder / "pytorch_model.bin").touch()


def _without_a_shard(folder, arrays):
  _shard(folder, arrays)
  (folder / "two.safetensors").unlink()


def _with_a_tensor_too_many(folder, arrays):
  _shard(folder, arrays)
  _index(folder, {"a": "one.safetensors", "d": "one.safetensors"})


def _outside_of_the_folder(folder, arrays):
  _index(folder, {"a": "../one.safetensors"})


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (_cut, "is not a whole safetensors file"),
    (_empty, r"is empty \(0 bytes\)"),
    (_pickled, "holds only pytorch_model.bin, a pickle"),
    (lambda *_: None, "has neither model.safetensors nor"),
    (_without_a_shard, "lacks the shard two.safetensors"),
    (_with_a_tensor_too_many, "lists tensors .* do not hold: d"),
    (_outside_of_the_folder, "must have a weight_map"),
  ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, arrays, make, message):
  make(tmp_path, arrays)
  with pytest.raises(weights.WeightsError, match=message):
    tensors.open_safetensors(tmp_path)
