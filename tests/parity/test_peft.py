"""PyTorch's PEFT loads our adapters and we load its, to the same logits.

Run by `make test-parity`.
"""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import peft as torch_peft
import pytest
import tokenizers
from tokenizers import models
import torch
import transformers

import bilora_jax
from bilora_jax import peft
from train import __main__ as program
from train import adapter
from train import config as config_lib
from train.models import hf_names, load, vit, vit_weights

# Of float32, and logits of about 1.
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("default")

_SIZES = {
  "vocab_size": 31,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 16,
  "initializer_range": 0.25,
}
_DECODER = _SIZES | {
  "num_key_value_heads": 1,
  "pad_token_id": None,
  "bos_token_id": None,
  "eos_token_id": None,
}
_VIT = vit.VitConfig(4, 3, 128, 2, 2, 256)
_CONFIGS = {
  "bert": lambda: transformers.BertConfig(**_SIZES, num_labels=2),
  "llama": lambda: transformers.LlamaConfig(**_DECODER),
  "qwen2": lambda: transformers.Qwen2Config(
    **_DECODER, tie_word_embeddings=True
  ),
  "vit": lambda: transformers.Dinov2Config(
    **vit_weights.hf_config(_VIT), num_labels=2, initializer_range=0.25
  ),
}
_KINDS = {
  "bert": transformers.AutoModelForTokenClassification,
  "llama": transformers.AutoModelForCausalLM,
  "qwen2": transformers.AutoModelForCausalLM,
  "vit": transformers.AutoModelForImageClassification,
}
_RUNS = {
  "bert": config_lib.Config(method="lora"),
  "llama": config_lib.Config(task="instructions", data="x", method="lora"),
  "qwen2": config_lib.Config(
    task="instructions", data="x", method="lora", scan_layers=True
  ),
}


class _Case(types.SimpleNamespace):
  """One model, in PyTorch and here."""

  def torch_logits(self, model):
    with torch.no_grad():
      found = model.eval()(torch.tensor(self.batch)).logits[0].numpy()
    # What a BERT's head is given here is the mean.
    return found.mean(0) if self.name == "bert" else found

  def logits(self, adapters=None):
    batch = jnp.asarray(self.batch)
    inputs = (batch, jnp.ones_like(batch)) if self.name == "bert" else (batch,)
    if adapters is None:
      return np.asarray(self.model.apply(self.variables, *inputs))[0]
    return np.asarray(self.adapted.apply(self.variables, adapters, *inputs))[0]

  def adapt(self, spec):
    batch = jnp.asarray(self.batch)
    inputs = (batch, jnp.ones_like(batch)) if self.name == "bert" else (batch,)
    self.adapted = bilora_jax.adapt(self.model, spec, *inputs)


def _moved(model, *parts):
  """What starts at zero or one would hide a mistake."""
  torch.manual_seed(1)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if any(part in name for part in parts):
        value += 0.2 * torch.randn_like(value)
  return model


@pytest.fixture(scope="module", params=_CONFIGS)
def case(request, tmp_path_factory):
  name = request.param
  folder = tmp_path_factory.mktemp(name)
  torch.manual_seed(0)
  model = _KINDS[name].from_config(_CONFIGS[name](), dtype=torch.float32)
  _moved(model, "bias", "norm", "Norm", "lambda", "cls_token")
  model.save_pretrained(folder)
  rng = np.random.default_rng(0)
  found = _Case(name=name, folder=folder)
  if name == "vit":
    side = _VIT.patch_size * _VIT.grid
    pixels = rng.normal(size=(1, 3, side, side)).astype(np.float32)
    found.model = vit.VitClassifier(_VIT, 2)
    found.variables = _vit_variables(model)
    found.pixels = pixels
    found.batch = pixels
    # PyTorch's images have their channels first.
    found.logits = types.MethodType(_vit_logits, found)
    found.adapt = types.MethodType(_vit_adapt, found)
    return found
  _save_tokenizer(folder)
  found.batch = rng.integers(0, 31, (1, 9))
  pretrained = load.open_pretrained(str(folder))
  if name == "bert":
    found.model = pretrained.encoder_classifier(2)
    variables = pretrained.variables(found.model, 0)
    state = model.state_dict()
    variables["params"]["head"] = {
      "kernel": jnp.asarray(state["classifier.weight"].numpy().T),
      "bias": jnp.asarray(state["classifier.bias"].numpy()),
    }
    found.variables = variables
  else:
    found.model = pretrained.language_model(scan=_RUNS[name].scan_layers)
    found.variables = pretrained.variables(found.model, 0)
  return found


def _vit_variables(model):
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  own = {
    k.removeprefix("dinov2."): v
    for k, v in state.items()
    if k.startswith("dinov2.")
  }
  head = {
    "kernel": jnp.asarray(state["classifier.weight"][:, :128].T),
    "bias": jnp.asarray(state["classifier.bias"]),
  }
  return {
    "params": {"encoder": vit_weights.vit_params(_VIT, own), "head": head}
  }


def _vit_adapt(self, spec):
  images = jnp.asarray(self.batch.transpose(0, 2, 3, 1))
  self.adapted = bilora_jax.adapt(self.model, spec, images)


def _vit_logits(self, adapters=None):
  images = jnp.asarray(self.batch.transpose(0, 2, 3, 1))
  if adapters is None:
    return np.asarray(self.model.apply(self.variables, images))[0]
  return np.asarray(self.adapted.apply(self.variables, adapters, images))[0]


def _save_tokenizer(folder):
  ids = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "a", "b"])}
  own = tokenizers.Tokenizer(models.WordLevel(ids, "[UNK]"))
  own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  own.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
  )


def _random_adapters(case):
  shapes = jax.eval_shape(case.adapted.init, jax.random.key(0), case.variables)
  rng = np.random.default_rng(2)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes
  )


def _spec(case, **fields):
  is_decoder = case.name in ("llama", "qwen2")
  return bilora_jax.LoraSpec(
    rank=3,
    alpha=5.0,
    auxiliary_rank=2,
    targets={
      ".*(query|q_proj)": {"rank": 2},
      ".*(output|down_proj)": {"alpha": 2.0},
      ".*": {},
    },
    exclude="lm_head" if is_decoder else None,
    extra=None if is_decoder else "head/.*",
    **fields,
  )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_peft_computes_with_our_folder_what_we_do(
  case, tmp_path, rslora, auxiliary
):
  case.adapt(_spec(case, rslora=rslora))
  adapters = _random_adapters(case)
  kind = hf_names.kind(case.model)
  peft.save(
    tmp_path,
    case.adapted,
    adapters,
    kind.names,
    base_model=str(case.folder),
    task_type=kind.task_type,
    auxiliary=auxiliary,
  )
  base = _KINDS[case.name].from_pretrained(case.folder)
  model = torch_peft.PeftModel.from_pretrained(base, tmp_path)
  kept = adapters if auxiliary else bilora_jax.primary(adapters)
  ours = case.logits(kept)
  np.testing.assert_allclose(
    case.torch_logits(model), ours, rtol=0, atol=TOLERANCE * 10**0
  )
  # And it is no small matter.
  assert np.abs(ours - case.logits()).max() > 0.1


_TARGETS = {
  "bert": ["query", "value", "dense"],
  "llama": ["q_proj", "v_proj", "down_proj"],
  "qwen2": ["q_proj", "v_proj", "down_proj"],
  "vit": ["query", "value", "fc1", "projection"],
}


@pytest.mark.parametrize("rslora", [False, True])
def test_we_compute_with_pefts_folder_what_it_does(case, tmp_path, rslora):
  base = _KINDS[case.name].from_pretrained(case.folder)
  kind = hf_names.kind(case.model)
  model = torch_peft.get_peft_model(
    base,
    torch_peft.LoraConfig(
      task_type=kind.task_type,
      r=3,
      lora_alpha=5,
      use_rslora=rslora,
      target_modules=_TARGETS[case.name],
      rank_pattern={_TARGETS[case.name][0]: 2},
      alpha_pattern={_TARGETS[case.name][-1]: 4},
    ),
  )
  model = _moved(model, "lora_", "modules_to_save")
  model.save_pretrained(tmp_path)
  spec = adapter.spec(str(tmp_path), case.model)
  case.adapt(dataclasses.replace(spec, auxiliary_rank=0))
  adapters = peft.load(tmp_path, case.adapted, kind.names)
  np.testing.assert_allclose(
    case.torch_logits(model), case.logits(adapters), rtol=0, atol=TOLERANCE
  )


def test_adapters_of_a_bare_model_are_read(case, tmp_path):
  base = transformers.AutoModel.from_pretrained(case.folder)
  lora = torch_peft.LoraConfig(r=2, target_modules=_TARGETS[case.name][:2])
  model = torch_peft.get_peft_model(base, lora)
  model.save_pretrained(tmp_path)
  spec = adapter.spec(str(tmp_path), case.model)
  case.adapt(dataclasses.replace(spec, auxiliary_rank=0))
  kind = hf_names.kind(case.model)
  found = peft.load(tmp_path, case.adapted, kind.names, prefix=kind.prefix)
  assert len(case.adapted.targets) == (2 if case.name == "qwen2" else 4)
  assert set(found) == {"primary"}


def test_a_merged_model_loads_in_transformers(case, tmp_path):
  if case.name == "vit":
    pytest.skip("read from ONNX files alone, which PyTorch exports")
  run, out = tmp_path / "run", tmp_path / "out"
  run.mkdir()
  config = dataclasses.replace(_RUNS[case.name], model=str(case.folder))
  (run / "config.json").write_text(config_lib.to_json(config))
  case.adapt(_spec(case))
  adapters = bilora_jax.primary(_random_adapters(case))
  bilora_jax.save_adapters(run / "adapters", case.adapted, adapters)
  options = ["--run", str(run), "--out", str(out), "--merged"]
  assert program.main(["export", *options]) == 0
  model, report = _KINDS[case.name].from_pretrained(
    out, output_loading_info=True
  )
  for name, wrong in report.items():
    assert not wrong, (name, wrong)
  np.testing.assert_allclose(
    case.torch_logits(model), case.logits(adapters), rtol=0, atol=TOLERANCE
  )
  own = transformers.AutoTokenizer.from_pretrained(out)
  assert own("a b c", add_special_tokens=False)["input_ids"] == [2, 3, 1]
