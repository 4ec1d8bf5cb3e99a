"""PEFT folders: to the bit there and back, and a sentence for each fault."""

import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bilora_jax import LoraSpec, adapt, peft, primary
from bilora_jax._adapted import Adapted

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class _Block(nn.Module):
  """A layer to scan over."""

  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(4, name="up")(x), None


class _Model(nn.Module):
  """Of each kind of kernel one: heads, scanned, a convolution, a head."""

  @nn.compact
  def __call__(self, x_BxSxSxC):
    x = nn.Conv(4, (2, 2), strides=2, name="patch")(x_BxSxSxC)
    x = nn.DenseGeneral((2, 3), name="query")(x.mean((1, 2)))
    x = nn.DenseGeneral(4, axis=(-2, -1), name="out")(x)
    layers = nn.scan(
      _Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    x, _ = layers(name="layers")(x, None)
    return nn.Dense(2, name="head")(nn.LayerNorm(name="norm")(x))


X = jnp.ones((1, 4, 4, 3))
NAMES = {
  "patch/kernel": peft.Convolution("net.patch.projection", 2, 2),
  "query/kernel": "net.attention.q",
  "out/kernel": "net.attention.out",
  "layers/up/kernel": tuple(f"net.layers.{i}.up" for i in range(3)),
  "norm/scale": "net.norm",
  "norm/bias": "net.norm",
  "head/kernel": peft.Wider("classifier", 4, 2),
  "head/bias": "classifier",
}
SPEC = LoraSpec(
  rank=2,
  alpha=0.3,
  auxiliary_rank=3,
  targets={"patch": {"rank": 3}, "query": {"alpha": 5.0}, ".*": {}},
  extra="(head|norm)/.*",
  dropout=0.1,
)


@pytest.fixture(scope="module")
def variables():
  return _Model().init(jax.random.key(0), X)


@pytest.fixture(scope="module")
def adapted():
  return adapt(_Model(), SPEC, X)


def _adapters(adapted: Adapted, variables, seed=0):
  """All of it random: zeros would hide a mistake."""
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), variables)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
  )


@pytest.fixture(scope="module")
def adapters(adapted, variables):
  return _adapters(adapted, variables)


@pytest.fixture
def folder(tmp_path, adapted, adapters):
  peft.save(tmp_path / "new" / "folder", adapted, adapters, NAMES)
  return tmp_path / "new" / "folder"


def _config(folder):
  return json.loads((folder / CONFIG).read_text())


def _change_config(folder, **values):
  (folder / CONFIG).write_text(json.dumps(_config(folder) | values))


def _tensors(folder):
  return safetensors.numpy.load_file(folder / TENSORS)


def _change_tensors(folder, change):
  tensors = _tensors(folder)
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / TENSORS)


def _assert_same_bits(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for x, y in zip(*map(jax.tree.leaves, (got, wanted))):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
  "fields",
  [{}, {"rslora": True}, {"dora": True}],
)
def test_what_is_loaded_is_what_was_saved(tmp_path, variables, fields):
  spec = LoraSpec(**{**vars(SPEC), **fields})
  adapted = adapt(_Model(), spec, X)
  adapters = _adapters(adapted, variables)
  peft.save(tmp_path, adapted, adapters, NAMES)
  # The structure has the scales.
  loaded = peft.load(tmp_path, adapted, NAMES)
  _assert_same_bits(loaded, primary(adapters))


def test_the_spec_of_a_folder_is_that_it_was_saved_with(
  folder, adapted, variables, adapters
):
  spec = peft.load_spec(folder, NAMES, auxiliary_rank=5)
  again = adapt(_Model(), spec, X)
  assert again.targets == adapted.targets
  assert again.shapes("primary") == adapted.shapes("primary")
  assert again.shapes("extra") == adapted.shapes("extra")
  assert (spec.auxiliary_rank, spec.dropout) == (5, 0.1)
  new = again.init(jax.random.key(2), variables)
  loaded = peft.load(folder, again, NAMES)
  _assert_same_bits(loaded, primary(adapters))
  # Ours joins the new auxiliary, whose b is zero: sums of other lengths.
  np.testing.assert_allclose(
    again.apply(variables, new | loaded, X),
    adapted.apply(variables, primary(adapters), X),
    rtol=1e-4,
  )


def test_tensors_are_as_in_pytorch(folder, adapters):
  tensors = _tensors(folder)
  pairs = adapters["primary"]
  prefix = "base_model.model."

  def pair(module):
    ends = ("lora_A", "lora_B")
    return [tensors[f"{prefix}{module}.{end}.weight"] for end in ends]

  up = pairs["layers"]["up"]["kernel"]
  a, b = pair("net.layers.1.up")
  np.testing.assert_array_equal(a, up.a[1].T)
  np.testing.assert_array_equal(b, up.b[1].T)
  # PyTorch's convolution: (out, in, height, width), the second of 1 x 1.
  kernel = pairs["patch"]["kernel"]
  a, b = pair("net.patch.projection")
  assert (a.shape, b.shape) == ((3, 3, 2, 2), (4, 3, 1, 1))
  np.testing.assert_allclose(
    np.einsum("rchw,or->hwco", a, b[..., 0, 0]).reshape(12, 4),
    kernel.a @ kernel.b,
    rtol=1e-5,
    atol=1e-6,
  )
  head = adapters["extra"]["head"]["kernel"]
  np.testing.assert_array_equal(
    tensors[f"{prefix}classifier.weight"], np.pad(head.T, ((0, 0), (0, 2)))
  )
  assert not any("auxiliary" in name for name in tensors)


def test_the_configuration_is_pefts(folder):
  config = _config(folder)
  assert (config["peft_type"], config["bias"]) == ("LORA", "none")
  assert (config["r"], config["lora_alpha"]) == (2, 0.3)
  assert config["rank_pattern"] == {r"net\.patch\.projection": 3}
  assert config["alpha_pattern"] == {r"net\.attention\.q": 5}
  assert config["modules_to_save"] == ["classifier", "net.norm"]
  assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]


def test_the_auxiliary_leaves_when_it_is_asked_for(
  tmp_path, adapted, adapters, variables
):
  peft.save(tmp_path, adapted, adapters, NAMES, auxiliary=True)
  spec = peft.load_spec(tmp_path, NAMES, auxiliary_rank=0)
  assert spec.rank == 5
  both = adapt(_Model(), spec, X)
  loaded = peft.load(tmp_path, both, NAMES)
  np.testing.assert_allclose(
    both.apply(variables, loaded, X),
    adapted.apply(variables, adapters, X),
    rtol=1e-5,
  )
  with pytest.raises(ValueError, match="the adapters have none"):
    peft.save(tmp_path, adapted, primary(adapters), NAMES, auxiliary=True)


def test_folders_of_a_bare_model_lack_its_prefix(tmp_path, adapted, adapters):
  bare = {
    path: peft.Convolution("patch.projection", 2, 2)
    if path == "patch/kernel"
    else tuple(x.removeprefix("net.") for x in name)
    if isinstance(name, tuple)
    else name.removeprefix("net.")
    if isinstance(name, str)
    else name
    for path, name in NAMES.items()
  }
  peft.save(tmp_path, adapted, adapters, bare)
  loaded = peft.load(tmp_path, adapted, NAMES, prefix="net.")
  _assert_same_bits(loaded, primary(adapters))
  with pytest.raises(ValueError, match="has no place"):
    peft.load(tmp_path, adapted, NAMES)


def test_bfloat16_is_read(folder, adapted, adapters):
  def halve(tensors):
    for name, value in tensors.items():
      tensors[name] = value.astype(jnp.bfloat16)

  _change_tensors(folder, halve)
  loaded = peft.load(folder, adapted, NAMES)
  rounded = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), primary(adapters)
  )
  _assert_same_bits(loaded, rounded)


def test_without_a_trained_head_there_is_no_extra(folder, adapted):
  def drop(tensors):
    for name in [n for n in tensors if "lora" not in n]:
      del tensors[name]

  _change_tensors(folder, drop)
  _change_config(folder, modules_to_save=None)
  assert set(peft.load(folder, adapted, NAMES)) == {"primary"}
  assert peft.load_spec(folder, NAMES).extra is None


def test_a_folder_without_factors_is_refused(folder):
  def drop(tensors):
    for name in [n for n in tensors if "lora" in n]:
      del tensors[name]

  _change_tensors(folder, drop)
  _change_config(folder, target_modules=[])
  with pytest.raises(ValueError, match="no tensor is a lora_A"):
    peft.load_spec(folder, NAMES)


def test_a_folder_without_magnitudes_is_no_dora(folder):
  own = adapt(_Model(), LoraSpec(**{**vars(SPEC), "dora": True}), X)
  with pytest.raises(ValueError, match="use_dora=False and the spec dora=True"):
    peft.load(folder, own, NAMES)


def test_magnitudes_are_as_in_pytorch(tmp_path, variables):
  own = adapt(_Model(), LoraSpec(**{**vars(SPEC), "dora": True}), X)
  adapters = _adapters(own, variables)
  peft.save(tmp_path, own, adapters, NAMES)
  tensors, extra = _tensors(tmp_path), adapters["extra"]
  end = ".lora_magnitude_vector"
  np.testing.assert_array_equal(
    tensors[f"base_model.model.net.layers.1.up{end}"],
    extra["layers"]["up"]["kernel_magnitude"][1],
  )
  np.testing.assert_array_equal(
    tensors[f"base_model.model.net.patch.projection{end}"],
    extra["patch"]["kernel_magnitude"].reshape(1, 4, 1, 1),
  )


def test_biases_without_their_weights_are_pefts_bias(tmp_path, variables):
  # Of an adapted module, that PEFT has wrapped, and of a norm.
  own = {**vars(SPEC), "exclude": "head"}
  spec = LoraSpec(**{**own, "extra": "(query|norm)/bias"})
  adapted = adapt(_Model(), spec, X)
  adapters = _adapters(adapted, variables)
  names = NAMES | {"query/bias": "net.attention.q"}
  with pytest.raises(ValueError, match="query/bias, of shape"):
    peft.save(tmp_path, adapted, adapters, names)
  spec = LoraSpec(**{**own, "extra": "(out|norm)/bias"})
  adapted = adapt(_Model(), spec, X)
  adapters = _adapters(adapted, variables)
  names = NAMES | {"out/bias": "net.attention.out"}
  peft.save(tmp_path, adapted, adapters, names)
  tensors = _tensors(tmp_path)
  assert "base_model.model.net.attention.out.base_layer.bias" in tensors
  assert "base_model.model.net.norm.bias" in tensors
  config = _config(tmp_path)
  assert (config["bias"], config["modules_to_save"]) == ("all", None)
  _assert_same_bits(peft.load(tmp_path, adapted, names), primary(adapters))


def test_what_is_left_out_is_said(folder, adapted, adapters):
  _change_tensors(
    folder,
    lambda t: t.update(
      {f"base_model.model.net.pooler.lora_{x}.weight": np.ones(2) for x in "AB"}
    ),
  )
  with pytest.raises(ValueError, match=r"net\.pooler\.lora_A.* has no place"):
    peft.load(folder, adapted, NAMES)
  with pytest.warns(UserWarning, match=r"also has net\.pooler, which this"):
    loaded = peft.load(folder, adapted, NAMES, left_out=["pooler"])
  _assert_same_bits(loaded, primary(adapters))
  assert peft.load_spec(folder, NAMES, left_out=["pooler"]).rank == SPEC.rank


def test_scanned_layers_are_adapted_alike(folder):
  _change_config(folder, alpha_pattern={r"layers\.1\.up": 3})
  with pytest.raises(ValueError, match=r"layers/up/kernel are scanned.*3\.0"):
    peft.load_spec(folder, NAMES)

  def drop(tensors):
    for name in [n for n in tensors if "layers.2." in n]:
      del tensors[name]

  _change_tensors(folder, drop)
  _change_config(folder, layers_to_transform=[0, 1])
  with pytest.raises(ValueError, match=r"net\.layers\.2\.up would have no"):
    peft.load_spec(folder, NAMES)


@pytest.mark.parametrize(
  ("values", "parts"),
  [
    ({"use_dora": True}, ["net.attention.q.lora_magnitude_vector is missing"]),
    ({"use_dora": 3}, ["use_dora is true or false", "3"]),
    ({"bias": "some"}, ["bias", "'none'", "'some'"]),
    ({"peft_type": "IA3"}, ["peft_type", "'LORA'", "'IA3'"]),
    ({"init_lora_weights": "pissa"}, ["init_lora_weights", "'pissa'"]),
    ({"lora_bias": True}, ["net.attention.q.lora_B.bias is missing"]),
    ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
    ({"trainable_token_indices": [1]}, ["trainable_tokens_delta is missing"]),
    ({"trainable_token_indices": [-1]}, ["trainable_token_indices", "[-1]"]),
    ({"layers_to_transform": "1"}, ["layers_to_transform", "'1'"]),
    ({"exclude_modules": 3}, ["exclude_modules", "list"]),
    (
      {"something_new": 3, "peft_version": "1.2"},
      ["something_new=3 is unknown here", "PEFT 1.2", "known is 0.21"],
    ),
    ({"something_new": 3}, ["does not say its version"]),
    ({"r": 0}, ["r is an integer", "got 0"]),
    ({"r": [4]}, ["r is an integer", "[4]"]),
    ({"lora_alpha": -1}, ["lora_alpha", "-1"]),
    ({"rank_pattern": {"(": 3}}, ["rank_pattern", "'('"]),
    ({"rank_pattern": {r"(q)\1": 3}}, ["rank_pattern", "(q)"]),
    (
      {"rank_pattern": {f"q{i}": 3 for i in range(5000)}},
      ["rank_pattern has 5,000", "at most 4,096"],
    ),
    ({"alpha_pattern": {"q": 0}}, ["alpha_pattern", "'q'"]),
    ({"target_modules": 3}, ["target_modules", "list"]),
    ({"modules_to_save": "head"}, ["modules_to_save", "'head'"]),
    ({"r": 4}, ["net.attention.q", "(2, 4)", "rank 4"]),
    ({"rank_pattern": {}}, ["net.patch.projection", "rank 2"]),
    ({"modules_to_save": ["net.norm"]}, ["classifier.weight", "not among"]),
    ({"lora_alpha": 0.6}, ["net.attention.out", "scale 0.3", "scale 0.15"]),
    ({"use_rslora": True}, ["net.attention.out", "scale 0.212"]),
  ],
)
def test_a_configuration_that_does_not_fit_is_refused(
  folder, adapted, values, parts
):
  _change_config(folder, **values)
  with pytest.raises(ValueError) as error:
    peft.load(folder, adapted, NAMES)
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_no_pattern_of_a_folder_takes_long(folder, adapted, key):
  expected = peft.load(folder, adapted, NAMES)
  config = json.loads((folder / "adapter_config.json").read_text())
  hostile = {"([a-z.]+)+!": 3, "(n|e|t|.*)*(.*)*!": 3}
  _change_config(folder, **{key: hostile | config[key]})
  _assert_same_bits(peft.load(folder, adapted, NAMES), expected)


def test_keys_of_features_that_are_off_are_let_pass(folder, adapted):
  _change_config(folder, use_dora=False, new_thing=None, other={})
  peft.load(folder, adapted, NAMES)


_Q = "base_model.model.net.attention.q."


@pytest.mark.parametrize(
  ("change", "parts"),
  [
    (lambda t: t.pop(f"{_Q}lora_B.weight"), ["q.lora_B.weight is missing"]),
    (
      lambda t: [t.pop(f"{_Q}lora_{x}.weight") for x in "AB"],
      ["q.lora_A.weight is missing", "q.lora_B.weight is missing"],
    ),
    (
      lambda t: t.update({f"{_Q}lora_magnitude_vector": np.ones(3)}),
      ["q.lora_magnitude_vector has no place"],
    ),
    (
      lambda t: t.update({f"{_Q}lora_A.weight": np.ones((2, 5), np.float32)}),
      ["query/kernel", "(5, 2)", "(4, 2)"],
    ),
    (
      lambda t: t.update({f"{_Q}lora_A.weight": np.ones((2, 4), np.int32)}),
      ["q.lora_A.weight is of int32"],
    ),
    (
      lambda t: t.update({"base_model.model.classifier.bias": np.ones(3)}),
      ["head/bias", "(3,)", "(2,)"],
    ),
    (
      lambda t: t.update(
        {"base_model.model.classifier.weight": np.ones((2, 6))}
      ),
      ["classifier.weight looks at 2 inputs beyond the 4"],
    ),
    (
      lambda t: t.pop("base_model.model.net.norm.bias"),
      ["norm.bias is missing"],
    ),
    (lambda t: t.update({"q.lora_A": np.ones(2)}), ["begin with", "q.lora_A"]),
    (
      lambda t: t.update(
        {f"{_Q}lora_B.weight": np.ones((6, 2, 1), np.float32)}
      ),
      ["lora_B of (6, 2, 1)", "rank 2"],
    ),
  ],
)
def test_tensors_that_do_not_fit_are_refused(folder, adapted, change, parts):
  _change_tensors(folder, change)
  with pytest.raises(ValueError) as error:
    peft.load(folder, adapted, NAMES)
  for part in parts:
    assert part in str(error.value)


def test_targets_that_are_not_the_specs_are_refused(folder):
  fewer = adapt(
    _Model(),
    LoraSpec(rank=2, alpha=0.3, targets="out|query", extra=SPEC.extra),
    X,
  )
  with pytest.raises(ValueError, match=r"layers\.0\.up has an adapter, but is"):
    peft.load(folder, fewer, NAMES)


def test_missing_files_are_named(tmp_path, folder, adapted):
  with pytest.raises(ValueError, match=f"it has no {CONFIG}"):
    peft.load(tmp_path, adapted, NAMES)
  (folder / TENSORS).write_bytes(b"12345678")
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    peft.load(folder, adapted, NAMES)
  (folder / TENSORS).unlink()
  with pytest.raises(ValueError, match=f"{TENSORS} is missing"):
    peft.load(folder, adapted, NAMES)
  (folder / "adapter_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match="a pickle, which can run code"):
    peft.load(folder, adapted, NAMES)
  (folder / CONFIG).write_text("[")
  with pytest.raises(ValueError, match="is not JSON"):
    peft.load(folder, adapted, NAMES)


@pytest.mark.parametrize(
  ("names", "parts"),
  [
    ({"query/kernel": None}, ["no module for query/kernel"]),
    ({"query/kernel": "net.attention.out"}, ["same place", "out/kernel"]),
    ({"layers/up/kernel": "up"}, ["layers/up/kernel", "sequence of 3"]),
    ({"layers/up/kernel": ["up"]}, ["layers/up/kernel", "sequence of 3"]),
    ({"query/kernel": ["q"]}, ["query/kernel", "one module"]),
    ({"query/kernel": peft.Wider("q", 4, 1)}, ["query/kernel", "Wider"]),
  ],
)
def test_names_that_do_not_fit_are_refused(
  tmp_path, adapted, adapters, names, parts
):
  own = {k: v for k, v in (NAMES | names).items() if v is not None}
  with pytest.raises(ValueError) as error:
    peft.save(tmp_path / "new", adapted, adapters, own)
  for part in parts:
    assert part in str(error.value)
  assert not (tmp_path / "new").exists()


def test_a_write_that_fails_leaves_the_old_files(
  folder, adapted, variables, monkeypatch
):
  before = {p.name: p.read_bytes() for p in folder.iterdir()}

  def full(*_):
    raise OSError("no space left")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match="no space"):
    peft.save(folder, adapted, _adapters(adapted, variables, 1), NAMES)
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
