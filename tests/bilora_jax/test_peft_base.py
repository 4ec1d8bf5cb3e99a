"""PEFT folders that change weights of their base, or hold copies of some."""

import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bilora_jax import LoraSpec, adapt, peft, primary

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class _Language(nn.Module):
  """An embedding whose table is the head's as well."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(5, 4, name="embed")
    return embed.attend(nn.Dense(4, name="up")(embed(tokens)))


X = jnp.ones((1, 2), int)
UNTIED = {
  "embed/embedding": "net.embed",
  "up/kernel": "net.up",
  "up/bias": "net.up",
}
NAMES = UNTIED | {"embed/embedding": peft.Tied("net.embed", ("head",))}
SPEC = LoraSpec(rank=2, alpha=3.0, targets="up", extra="embed/embedding")
PREFIX = "base_model.model."
TABLE = np.arange(20, dtype=np.float32).reshape(5, 4)
BASE = {"embed.weight": TABLE, "net.up.bias": np.ones(4, np.float32)}


@pytest.fixture(scope="module")
def adapted():
  return adapt(_Language(), SPEC, X)


@pytest.fixture(scope="module")
def adapters(adapted):
  variables = _Language().init(jax.random.key(0), X)
  rng = np.random.default_rng(0)
  return primary(
    jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
      adapted.init(jax.random.key(1), variables),
    )
  )


@pytest.fixture
def folder(tmp_path, adapted, adapters):
  peft.save(tmp_path, adapted, adapters, NAMES)
  return tmp_path


@pytest.fixture
def bare(folder):
  """Of the pair alone, to add tensors to."""
  _change(folder, {"net.embed.weight": None, "head.weight": None})
  _configure(folder, modules_to_save=None, ensure_weight_tying=False)
  return folder


def _change(folder, changes):
  tensors = safetensors.numpy.load_file(folder / TENSORS)
  for name, value in changes.items():
    tensors.pop(PREFIX + name, None)
    if value is not None:
      tensors[PREFIX + name] = np.ascontiguousarray(value, np.float32)
  safetensors.numpy.save_file(tensors, folder / TENSORS)


def _configure(folder, **values):
  config = json.loads((folder / CONFIG).read_text()) | values
  (folder / CONFIG).write_text(json.dumps(config))


def _table(folder, names, adapted=None, base=BASE):
  """What is read of the embedding, by the spec that the folder asks for."""
  spec = peft.load_spec(folder, names, prefix="net.", auxiliary_rank=0)
  adapted = adapted or adapt(_Language(), spec, X)
  found = peft.load(folder, adapted, names, prefix="net.", base=base)
  return found["extra"]["embed"]["embedding"]


def test_a_tied_table_is_written_of_both_modules(folder, adapters):
  tensors = safetensors.numpy.load_file(folder / TENSORS)
  wanted = adapters["extra"]["embed"]["embedding"]
  for module in ("net.embed", "head"):
    np.testing.assert_array_equal(tensors[f"{PREFIX}{module}.weight"], wanted)
  config = json.loads((folder / CONFIG).read_text())
  assert config["ensure_weight_tying"] is True
  assert config["modules_to_save"] == ["net.embed", "head"]
  np.testing.assert_array_equal(_table(folder, NAMES), wanted)


@pytest.mark.parametrize("twin", [None, TABLE])
def test_a_tied_table_that_is_not_the_head_s_is_refused(folder, twin):
  _change(folder, {"head.weight": twin})
  _configure(folder, ensure_weight_tying=False)
  with pytest.raises(ValueError, match=r"net\.embed and head are trained apa"):
    peft.load_spec(folder, NAMES)


def test_factors_of_an_embedding_are_added_to_the_base(bare):
  rng = np.random.default_rng(1)
  a, b = rng.normal(size=(2, 5)), rng.normal(size=(4, 2))
  pair = {"net.embed.lora_embedding_A": a, "net.embed.lora_embedding_B": b}
  _change(bare, pair)
  _configure(bare, target_modules=["up", "embed"])
  wanted = TABLE + 1.5 * (b @ a).T
  np.testing.assert_allclose(_table(bare, UNTIED), wanted, rtol=1e-5)
  with pytest.raises(ValueError, match="embed and head are trained apart"):
    peft.load_spec(bare, NAMES)
  # Tied, as PEFT writes them: the head's are the transposes.
  _change(bare, {"head.lora_A.weight": b.T, "head.lora_B.weight": a.T})
  np.testing.assert_allclose(_table(bare, NAMES), wanted, rtol=1e-5)
  _change(bare, {"net.embed.lora_embedding_A": a[:1]})
  with pytest.raises(ValueError, match="no lora_embedding_A and lora_embedd"):
    peft.load_spec(bare, UNTIED)


def test_rows_of_tokens_replace_the_base_s(bare):
  rows = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
  _change(bare, {"net.embed.token_adapter.trainable_tokens_delta": rows})
  _configure(bare, trainable_token_indices={"embed": [3, 0]})
  wanted = TABLE.copy()
  wanted[[3, 0]] = rows
  for names in (NAMES, UNTIED):
    np.testing.assert_array_equal(_table(bare, names), wanted)
  _configure(bare, trainable_token_indices=[3])
  with pytest.raises(ValueError, match=r"shape \(2, 4\), but .* 1 tokens"):
    peft.load_spec(bare, NAMES)
  _configure(bare, trainable_token_indices=[3, 5])
  with pytest.raises(ValueError, match="has the token 5, but the base has 5 t"):
    _table(bare, NAMES)
  with pytest.raises(
    ValueError, match=r"folder changes net\.embed\.weight, and"
  ):
    _table(bare, NAMES, base=None)


def test_a_bias_of_the_second_factor_is_added_to_the_layer_s(bare):
  _change(bare, {"net.up.lora_B.bias": np.array([1, 2, 3, 4])})
  _configure(bare, lora_bias=True)
  spec = peft.load_spec(bare, UNTIED)
  assert spec.extra == "up/bias"
  found = peft.load(bare, adapt(_Language(), spec, X), UNTIED, base=BASE)
  np.testing.assert_allclose(
    found["extra"]["up"]["bias"], 1 + 1.5 * np.array([1, 2, 3, 4])
  )
  _change(bare, {"net.up.lora_B.bias": np.ones(1)})
  with pytest.raises(
    ValueError, match=r"of the shape \(4,\): the change has the sh"
  ):
    peft.load(bare, adapt(_Language(), spec, X), UNTIED, base=BASE)
  names = {k: x for k, x in UNTIED.items() if k != "up/bias"}
  with pytest.raises(ValueError, match="in this model, no bias to add it"):
    peft.load_spec(bare, names)


@pytest.mark.parametrize(
  ("copy", "part"),
  [
    (TABLE + 1, "is a copy of another base's weight"),
    (np.zeros((7, 4)), r"resize_token_embeddings\(7\)"),
    (
      np.zeros((5, 3)),
      r"has the shape \(5, 3\), but the base's weight has \(5, 4\)",
    ),
  ],
)
@pytest.mark.parametrize("name", ["net.embed.base_layer", "head"])
def test_copies_of_the_base_are_compared_with_it(bare, name, copy, part):
  spec = peft.load_spec(bare, NAMES)
  plain = adapt(_Language(), spec, X)
  _change(bare, {f"{name}.weight": TABLE})
  peft.load(bare, plain, NAMES, prefix="net.", base=BASE)
  with pytest.raises(
    ValueError, match="base=, to compare it with, is not given"
  ):
    peft.load(bare, plain, NAMES)
  with pytest.raises(ValueError, match="and the base has no such weight"):
    peft.load(bare, plain, NAMES, base={})
  _change(bare, {f"{name}.weight": copy})
  with pytest.raises(ValueError, match=part):
    peft.load(bare, plain, NAMES, prefix="net.", base=BASE)


def test_a_saved_table_of_more_tokens_says_that_the_base_was_resized(bare):
  _change(bare, {"net.embed.weight": np.zeros((5, 4))})
  _configure(bare, modules_to_save=["embed"])
  plain = adapt(_Language(), peft.load_spec(bare, UNTIED), X)
  peft.load(bare, plain, UNTIED, base=BASE)
  _change(bare, {"net.embed.weight": np.zeros((7, 4))})
  with pytest.raises(ValueError, match=r"resize_token_embeddings\(7\)"):
    peft.load(bare, plain, UNTIED, base=BASE)
