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
import safetensors.numpy
import tokenizers
from tokenizers import models
import torch
import transformers

import bilora_jax
from bilora_jax import peft
from train import __main__ as program
from train.methods import adapter
from train.models import load, registry
from train.models.vit import model as vit
from train.models.vit import onnx_file
from train.models.vit import weights as vit_weights
from train.run import config as config_lib

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
_T5 = {
  "vocab_size": 31,
  "d_model": 16,
  "d_kv": 6,
  "d_ff": 24,
  "num_layers": 2,
  "num_decoder_layers": 1,
  "num_heads": 2,
  # Of its own it starts with logits of some tens.
  "initializer_factor": 0.5,
}
_VIT = vit.VitConfig(4, 3, 128, 2, 2, 256)
_DEBERTA = _SIZES | {
  "relative_attention": True,
  "pos_att_type": ["p2c", "c2p"],
  "position_biased_input": False,
}
_ENCODERS = {
  "bert": lambda: transformers.BertConfig(**_SIZES),
  "roberta": lambda: transformers.RobertaConfig(**_SIZES),
  "distilbert": lambda: transformers.DistilBertConfig(
    vocab_size=31,
    dim=16,
    n_layers=2,
    n_heads=2,
    hidden_dim=24,
    max_position_embeddings=16,
    initializer_range=0.25,
  ),
  "electra": lambda: transformers.ElectraConfig(**_SIZES, embedding_size=8),
  "deberta": lambda: transformers.DebertaConfig(**_DEBERTA),
  # Where one projection is used twice.
  "deberta v3": lambda: transformers.DebertaV2Config(
    **_DEBERTA,
    share_att_key=True,
    position_buckets=6,
    norm_rel_ebd="layer_norm",
  ),
  "modernbert": lambda: transformers.ModernBertConfig(
    **_SIZES,
    local_attention=6,
    global_attn_every_n_layers=2,
    classifier_pooling="mean",
    **dict.fromkeys(("pad_token_id", "cls_token_id"), 0),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"), 0),
  ),
}
_PICTURES = _SIZES | {"image_size": 16, "patch_size": 4}
_GEMMA3 = _DECODER | {
  "head_dim": 6,
  "sliding_window": 4,
  "layer_types": ["sliding_attention", "full_attention"],
}
_SIGHT = {
  "depth": 1,
  "num_heads": 2,
  "hidden_size": 8,
  "intermediate_size": 8,
  "out_hidden_size": 16,
  "patch_size": 4,
  "spatial_merge_size": 1,
}
_IMAGE_TOKENS = {
  "image_token_id": 27,
  "video_token_id": 28,
  "vision_start_token_id": 29,
  "vision_end_token_id": 30,
}


def _mrope(*sections):
  rope = {"rope_type": "default", "rope_theta": 50.0}
  return {**rope, "mrope_section": list(sections)}


_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.25}
_GPT2 |= {"n_positions": 64, "vocab_size": 31, "pad_token_id": 0}
_GPT2 |= {"bos_token_id": None, "eos_token_id": None}
_DECODERS = {
  "llama": lambda: transformers.LlamaConfig(**_DECODER),
  "mistral": lambda: transformers.MistralConfig(**_DECODER, sliding_window=4),
  "qwen2": lambda: transformers.Qwen2Config(
    **_DECODER, tie_word_embeddings=True
  ),
  "qwen3": lambda: transformers.Qwen3Config(**_DECODER, head_dim=6),
  "smollm3": lambda: transformers.SmolLM3Config(
    **_DECODER, no_rope_layer_interval=2, attention_bias=True
  ),
  "gemma": lambda: transformers.GemmaConfig(**_DECODER, head_dim=6),
  "gemma2": lambda: transformers.Gemma2Config(
    **_DECODER, head_dim=6, sliding_window=4, query_pre_attn_scalar=5
  ),
  "gemma3_text": lambda: transformers.Gemma3TextConfig(**_GEMMA3),
  # It reads images too; PEFT has other names for its layers.
  "gemma3": lambda: transformers.Gemma3Config(
    text_config=transformers.Gemma3TextConfig(**_GEMMA3),
    vision_config={
      **_PICTURES,
      "model_type": "siglip_vision_model",
      "vision_use_head": False,
    },
  ),
  "gpt2": lambda: transformers.GPT2Config(**_GPT2),
  "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
    text_config={**_DECODER, "rope_parameters": _mrope(1, 1, 2)},
    vision_config=_SIGHT,
    **_IMAGE_TOKENS,
  ),
  "qwen3_vl": lambda: transformers.Qwen3VLConfig(
    text_config={
      **_DECODER,
      "head_dim": 6,
      "rope_parameters": _mrope(1, 1, 1),
    },
    vision_config={
      **_SIGHT,
      "num_position_embeddings": 4,
      "deepstack_visual_indexes": [0],
    },
    **_IMAGE_TOKENS,
  ),
}
_TEXTS = {k: v for k, v in _SIZES.items() if k != "initializer_range"}
_TOWERS = {
  "hf vit": lambda: transformers.ViTConfig(**_PICTURES, num_labels=10),
  "deit": lambda: transformers.DeiTConfig(**_PICTURES, num_labels=10),
  "clip": lambda: transformers.CLIPConfig(
    text_config=_TEXTS, vision_config=_PICTURES, num_labels=10
  ),
  "siglip": lambda: transformers.SiglipConfig(
    text_config=_TEXTS, vision_config=_PICTURES, num_labels=10
  ),
}
_CONFIGS = {
  **_ENCODERS,
  **_DECODERS,
  **_TOWERS,
  "bert sequence": lambda: transformers.BertConfig(**_SIZES, num_labels=2),
  "llama sequence": lambda: transformers.LlamaConfig(**_DECODER, num_labels=2),
  "gpt2 sequence": lambda: transformers.GPT2Config(**_GPT2, num_labels=2),
  "t5": lambda: transformers.T5Config(**_T5, feed_forward_proj="relu"),
  "t5 v1.1": lambda: transformers.T5Config(
    **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False
  ),
  "mt5": lambda: transformers.MT5Config(**_T5),
  "vit": lambda: transformers.Dinov2Config(
    **onnx_file.hf_config(_VIT), num_labels=2, initializer_range=0.25
  ),
}
_KINDS = {
  **dict.fromkeys(_ENCODERS, transformers.AutoModelForTokenClassification),
  "modernbert": transformers.AutoModelForSequenceClassification,
  "bert sequence": transformers.AutoModelForSequenceClassification,
  **dict.fromkeys(_DECODERS, transformers.AutoModelForCausalLM),
  **dict.fromkeys(
    ("qwen2_5_vl", "qwen3_vl"), transformers.AutoModelForImageTextToText
  ),
  **dict.fromkeys(_TOWERS, transformers.AutoModelForImageClassification),
  # Which of its two classifiers the auto class cannot tell.
  "deit": transformers.DeiTForImageClassification,
  "llama sequence": transformers.AutoModelForSequenceClassification,
  "gpt2 sequence": transformers.AutoModelForSequenceClassification,
  "t5": transformers.AutoModelForSeq2SeqLM,
  "t5 v1.1": transformers.AutoModelForSeq2SeqLM,
  "mt5": transformers.AutoModelForSeq2SeqLM,
  "vit": transformers.AutoModelForImageClassification,
}
# Layers of ours that a part which is not read has too.
_EXCLUDED = {
  "gemma3": r".*vision_tower.*",
  **dict.fromkeys(("qwen2_5_vl", "qwen3_vl"), r".*visual.*"),
}
_HEADS = {
  "bert sequence": "classifier",
  "llama sequence": "score",
  "gpt2 sequence": "score",
}
_CHATS = {"task": "instructions", "data": "x"}
_RUNS = {
  **{name: {} for name in _ENCODERS},
  "bert sequence": {"head": "sequence"},
  **dict.fromkeys(_DECODERS, _CHATS),
  **{key: {"task": "digits"} for key in _TOWERS},
  "llama sequence": {"head": "sequence", "scan_layers": True},
  "gpt2 sequence": {"head": "sequence"},
  "qwen2": {**_CHATS, "scan_layers": True},
  "gemma": {**_CHATS, "scan_layers": True},
  "mistral": {**_CHATS, "scan_layers": True},
  "t5": {"scan_layers": True},
  "t5 v1.1": {},
  "mt5": {},
}


class _Case(types.SimpleNamespace):
  """One model, in PyTorch and here, and what both are given.

  Attributes:
    folder: of transformers.
    batch: PyTorch's inputs.
    inputs: ours.
  """

  def torch_logits(self, model):
    batch = {key: torch.tensor(x) for key, x in self.batch.items()}
    with torch.no_grad():
      found = model.eval()(**batch).logits[0].numpy()
    # What a BERT's head is given here is the mean.
    is_of_tokens = _KINDS[self.name] is _KINDS["bert"]
    return found.mean(0) if is_of_tokens else found

  def adapt(self, spec):
    self.adapted = bilora_jax.adapt(self.model, spec, *self.inputs)

  def logits(self, adapters=None):
    if adapters is None:
      return self.model.apply(self.variables, *self.inputs)[0]
    return self.adapted.apply(self.variables, adapters, *self.inputs)[0]


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
  make = getattr(_KINDS[name], "from_config", _KINDS[name])
  model = make(_CONFIGS[name]()).float()
  _moved(model, "bias", "norm", "Norm", "lambda", "cls_token")
  model.save_pretrained(folder)
  found = _Case(name=name, folder=folder)
  kinds = {"vit": _vit, "t5": _t5, "t5 v1.1": _t5, "mt5": _t5}
  kinds |= dict.fromkeys(_TOWERS, _tower)
  kinds |= dict.fromkeys(_ENCODERS, _encoder)
  kinds |= dict.fromkeys(_HEADS, _sequence)
  kinds.get(name, _decoder)(found, model)
  return found


def _encoder(case, model):
  _decoder_inputs(case)
  case.inputs += (jnp.ones_like(case.inputs[0]),)
  pretrained = load.open_pretrained(str(case.folder))
  case.model = pretrained.classifier(2)
  case.variables = pretrained.variables(case.model, 0)
  case.variables["params"]["head"] = _head(model, 16)


def _sequence(case, model):
  _decoder_inputs(case)
  case.inputs += (jnp.ones_like(case.inputs[0]),)
  pretrained = load.open_pretrained(str(case.folder), head="sequence")
  scans = _RUNS[case.name].get("scan_layers", False)
  case.model = pretrained.classifier(2, **({"scan": True} if scans else {}))
  case.variables = pretrained.variables(case.model, 0)
  head = _HEADS[case.name]
  case.variables["params"]["head"] = _dense(getattr(model, head))


def _decoder(case, _):
  _decoder_inputs(case)
  pretrained = load.open_pretrained(str(case.folder))
  scans = _RUNS[case.name].get("scan_layers", False)
  case.model = pretrained.language_model(scan=scans)
  case.variables = pretrained.variables(case.model, 0)


def _decoder_inputs(case):
  _save_tokenizer(case.folder)
  tokens = np.random.default_rng(0).integers(0, 27, (1, 9))
  case.batch = {"input_ids": tokens}
  case.inputs = (jnp.asarray(tokens),)


def _t5(case, _):
  _decoder_inputs(case)
  targets = np.random.default_rng(1).integers(0, 31, (1, 5))
  shifted = np.concatenate([np.zeros((1, 1), int), targets[:, :-1]], 1)
  case.batch["decoder_input_ids"] = shifted
  case.inputs += (jnp.ones_like(case.inputs[0]), jnp.asarray(targets))
  pretrained = load.open_pretrained(str(case.folder))
  case.model = pretrained.language_model(scan=case.name == "t5")
  case.variables = pretrained.variables(case.model, 0)


def _vit(case, model):
  side = _VIT.patch_size * _VIT.grid
  draws = np.random.default_rng(0).normal(size=(1, 3, side, side))
  pixels = draws.astype(np.float32)
  case.batch = {"pixel_values": pixels}
  case.inputs = (jnp.asarray(pixels.transpose(0, 2, 3, 1)),)
  # Not of the model: its names are others than a checkpoint's.
  stored = safetensors.numpy.load_file(case.folder / "model.safetensors")
  own = {
    name.removeprefix("dinov2."): value
    for name, value in stored.items()
    if name.startswith("dinov2.")
  }
  case.model = vit.VitClassifier(_VIT, 2)
  encoder = vit_weights.vit_params(_VIT, own)
  head = _head(model, _VIT.hidden_size)
  case.variables = {"params": {"encoder": encoder, "head": head}}


def _tower(case, model):
  draws = np.random.default_rng(0).normal(size=(1, 3, 16, 16))
  pixels = draws.astype(np.float32)
  case.batch = {"pixel_values": pixels}
  case.inputs = (jnp.asarray(pixels.transpose(0, 2, 3, 1)),)
  pretrained = load.open_pretrained(str(case.folder))
  case.model = pretrained.classifier(10)
  case.variables = pretrained.variables(case.model, 0)
  case.variables["params"]["head"] = _dense(model.classifier)


def _dense(module):
  own = {"kernel": jnp.asarray(module.weight.detach().numpy().T)}
  if module.bias is not None:
    own["bias"] = jnp.asarray(module.bias.detach().numpy())
  return own


def _head(model, width):
  weight, bias = model.classifier.weight, model.classifier.bias
  return {
    "kernel": jnp.asarray(weight.detach().numpy()[:, :width].T),
    "bias": jnp.asarray(bias.detach().numpy()),
  }


def _blind(classifier):
  """Takes what no head of ours is given from a ViT's: the patches' mean."""
  with torch.no_grad():
    classifier.weight[:, _VIT.hidden_size :] = 0


def _save_tokenizer(folder):
  # With the labels of the runs' task, by which a T5 answers.
  words = ["[PAD]", "[UNK]", "a", "b", "negative", "positive"]
  ids = {token: i for i, token in enumerate(words)}
  own = tokenizers.Tokenizer(models.WordLevel(ids, "[UNK]"))
  own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  own.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
  )


def _random_adapters(case):
  shapes = jax.eval_shape(case.adapted.init, jax.random.key(0), case.variables)
  rng = np.random.default_rng(2)
  # Half as large again, PyTorch's float32 logits of the ViT are 6e-6 from its
  # float64 ones, and ours 3e-6: more than the tolerance apart on some CPUs.
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes
  )


def _spec(case, **fields):
  is_decoder = case.name not in ("vit", *_ENCODERS, *_HEADS, *_TOWERS)
  return bilora_jax.LoraSpec(
    rank=3,
    alpha=5.0,
    auxiliary_rank=2,
    targets={
      ".*(query|q_proj|/q|qkv|qkv_proj)": {"rank": 2},
      ".*(output|down_proj|/wo)": {"alpha": 2.0},
      ".*": {},
    },
    # A tied model has no head to leave out, and an idle name is refused.
    exclude="lm_head" if "lm_head" in case.variables["params"] else None,
    extra=None if is_decoder else "head/.*",
    **fields,
  )


@pytest.mark.parametrize("how", ["", "rslora", "dora"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_peft_computes_with_our_folder_what_we_do(
  case, tmp_path, how, auxiliary
):
  case.adapt(_spec(case, **({how: True} if how else {})))
  adapters = _random_adapters(case)
  kind = registry.family_of(case.model).kind_of(case.model)
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
    case.torch_logits(model), ours, rtol=0, atol=TOLERANCE
  )
  # And it is no small matter.
  assert np.abs(ours - case.logits()).max() > 0.05


_TARGETS = {
  **{name: ["query", "value", "dense"] for name in _ENCODERS},
  "distilbert": ["q_lin", "v_lin", "lin2"],
  "deberta": ["in_proj", "pos_q_proj", "dense"],
  "deberta v3": ["query_proj", "key_proj", "dense"],
  "modernbert": ["Wqkv", "Wo", "dense"],
  "bert sequence": ["query", "value", "dense"],
  **{name: ["q_proj", "v_proj", "down_proj"] for name in _DECODERS},
  "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
  "gpt2 sequence": ["c_attn", "c_fc", "mlp.c_proj"],
  **{name: ["q_proj", "v_proj", "fc1"] for name in _TOWERS},
  # Its pooling head has an fc1 and an out_proj too, which are not read.
  "siglip": ["q_proj", "v_proj", "k_proj"],
  "llama sequence": ["q_proj", "v_proj", "down_proj"],
  "t5": ["q", "v", "wo"],
  "t5 v1.1": ["q", "v", "wo"],
  "mt5": ["q", "v", "wo"],
  "vit": ["q_proj", "o_proj", "fc1", "projection"],
}


@pytest.mark.parametrize("how", ["", "rslora", "dora"])
def test_we_compute_with_pefts_folder_what_it_does(case, tmp_path, how):
  base = _KINDS[case.name].from_pretrained(case.folder)
  kind = registry.family_of(case.model).kind_of(case.model)
  model = torch_peft.get_peft_model(
    base,
    torch_peft.LoraConfig(
      task_type=kind.task_type,
      r=3,
      lora_alpha=5,
      use_rslora=how == "rslora",
      use_dora=how == "dora",
      target_modules=_TARGETS[case.name],
      rank_pattern={_TARGETS[case.name][0]: 2},
      alpha_pattern={_TARGETS[case.name][-1]: 4},
      modules_to_save=["classifier"] if case.name == "vit" else None,
      exclude_modules=_EXCLUDED.get(case.name),
    ),
  )
  model = _moved(model, "lora_", "modules_to_save")
  if case.name == "vit":
    _blind(model.classifier.modules_to_save.default)
  model.save_pretrained(tmp_path)
  spec = adapter.of(str(tmp_path), case.model).spec()
  case.adapt(dataclasses.replace(spec, auxiliary_rank=0))
  adapters = peft.load(tmp_path, case.adapted, kind.names)
  np.testing.assert_allclose(
    case.torch_logits(model), case.logits(adapters), rtol=0, atol=TOLERANCE
  )


def test_adapters_of_a_bare_model_are_read(case, tmp_path):
  if case.name in ("clip", "siglip"):
    pytest.skip("a bare model has a text tower too, which its adapters are on")
  base = transformers.AutoModel.from_pretrained(case.folder)
  lora = torch_peft.LoraConfig(
    r=2,
    target_modules=_TARGETS[case.name][:2],
    exclude_modules=_EXCLUDED.get(case.name),
  )
  model = torch_peft.get_peft_model(base, lora)
  model.save_pretrained(tmp_path)
  spec = adapter.of(str(tmp_path), case.model).spec()
  case.adapt(dataclasses.replace(spec, auxiliary_rank=0))
  kind = registry.family_of(case.model).kind_of(case.model)
  found = peft.load(tmp_path, case.adapted, kind.names, prefix=kind.prefix)
  # Scanned layers are one; a T5 has three attentions in a layer of each, and a
  # ModernBERT two modules of one name.
  wanted = {
    "qwen2": 2,
    "mistral": 2,
    "gemma": 2,
    "llama sequence": 2,
    "t5": 6,
    "t5 v1.1": 8,
    "mt5": 8,
  }
  wanted["modernbert"] = 6
  assert len(case.adapted.targets) == wanted.get(case.name, 4)
  assert set(found) == {"primary"}


def test_a_merged_model_loads_in_transformers(case, tmp_path):
  case.adapt(_spec(case))
  adapters = bilora_jax.primary(_random_adapters(case))
  out = tmp_path / "out"
  if case.name == "vit":
    _write_vit(case, adapters, out)
  else:
    _export(case, adapters, tmp_path / "run", out)
  model, report = _KINDS[case.name].from_pretrained(
    out, output_loading_info=True
  )
  for name, wrong in report.items():
    assert not wrong, (name, wrong)
  np.testing.assert_allclose(
    case.torch_logits(model), case.logits(adapters), rtol=0, atol=TOLERANCE
  )
  if case.name not in ("vit", *_TOWERS):
    own = transformers.AutoTokenizer.from_pretrained(out)
    assert own("a b", add_special_tokens=False)["input_ids"] == [2, 3]


def _export(case, adapters, run, out):
  """As of a run of the program."""
  run.mkdir()
  given = {"method": "lora", "model": str(case.folder), **_RUNS[case.name]}
  config = config_lib.build(given)
  (run / "config.json").write_text(config_lib.to_json(config))
  bilora_jax.save_adapters(run / "adapters", case.adapted, adapters)
  options = ["--run", str(run), "--out", str(out), "--merged"]
  assert program.main(["export", *options]) == 0


def _write_vit(case, adapters, out):
  """The program reads a ViT from ONNX files, with heads of 64."""
  out.mkdir()
  merged = case.adapted.merge(case.variables, adapters)
  found = registry.family_of(case.model).tensors(case.model, merged["params"])
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(value) for name, value in found.items()},
    out / "model.safetensors",
    metadata={"format": "pt"},
  )
  config = onnx_file.hf_config(_VIT) | {"num_labels": 2}
  (out / "config.json").write_text(json.dumps(config))
