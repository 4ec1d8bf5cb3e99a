"""Writes adapter folders by PEFT over its options, and what PEFT computes.

Run it where `make test-parity` runs, from anywhere:

  .venv-parity/bin/python tests/parity/make_adapter_folders.py

The bases are the models in tests/train/models/data. Each case is a folder:
`adapter`, as PEFT saves it, of factors that are all random, and reference.npz:
a row of tokens, and if the folder is one to load, its logits in float32. Some
cases are committed, in `adapters` beside the bases, with cases.json that says
what is to be made of each; CI needs no PyTorch. `make test-parity` makes all.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
import shutil
import tempfile
from typing import Any
import warnings

import make_peft_references
import numpy as np
import peft
import safetensors.torch
import torch
import transformers

DATA = pathlib.Path(__file__).parents[1] / "train" / "models" / "data"
OUT = DATA / "adapters"
LENGTH = 7
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_TIED, _UNTIED, _BERT = "llama_tied", "qwen2", "peft_bert"
_POOLED = "bert_pooled"
_ATTENTION = ["q_proj", "v_proj"]

Folder = pathlib.Path
Model = torch.nn.Module


def _same(model: Model) -> Model:
  return model


def _nothing(folder: Folder) -> None:
  del folder


@dataclasses.dataclass(frozen=True)
class Case:
  """A folder to write, and what is to be made of it.

  Attributes:
    base: the folder of its base, in DATA.
    options: of PEFT's configuration.
    refusal: a regular expression for the sentence that refuses the folder;
      empty if it is one to load.
    selective: whether layers differ, so that none can be scanned.
    kind: of PEFT's configuration.
    head: of the base: 'own', 'none' or 'sequence'.
    before: what is done to the base.
    after: what is done to the folder.
    reads: whether PEFT reads the folder; if not, its logits are those of the
      model that was saved.
  """

  base: str
  options: Mapping[str, Any]
  refusal: str = ""
  selective: bool = False
  kind: Callable[..., Any] = peft.LoraConfig
  head: str = "own"
  before: Callable[[Model], Model] = _same
  after: Callable[[Folder], None] = _nothing
  reads: bool = True


def _change(**values: Any) -> Callable[[Folder], None]:
  """Changes keys of the configuration; None takes one out."""

  def after(folder: Folder) -> None:
    path = folder / _CONFIG
    config = json.loads(path.read_text()) | values
    kept = {k: v for k, v in config.items() if v is not None}
    path.write_text(json.dumps(kept, indent=2))

  return after


def _only(*keys: str) -> Callable[[Folder], None]:
  """Keeps the keys that an old version had."""

  def after(folder: Folder) -> None:
    path = folder / _CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: config[k] for k in keys}, indent=2))

  return after


def _tensors(
  change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]],
) -> Callable[[Folder], None]:
  def after(folder: Folder) -> None:
    found = safetensors.torch.load_file(folder / _TENSORS)
    new = dict(change(name, x) for name, x in found.items())
    safetensors.torch.save_file(new, folder / _TENSORS, {"format": "pt"})

  return after


def _pickled(folder: Folder) -> None:
  found = safetensors.torch.load_file(folder / _TENSORS)
  torch.save(found, folder / "adapter_model.bin")
  (folder / _TENSORS).unlink()


def _resized(model: Model) -> Model:
  model.resize_token_embeddings(model.config.vocab_size + 3)
  return model


def _other(model: Model) -> Model:
  with torch.no_grad():
    model.lm_head.weight += 0.1
  return model


# Of PEFT 0.2.
_OLD = (
  *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
  *("init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save"),
  *("peft_type", "r", "target_modules", "task_type"),
)


def _decoder(base: str, **options: Any) -> Case:
  fields = {f.name for f in dataclasses.fields(Case)}
  own = {k: options.pop(k) for k in fields & set(options)}
  given = {"target_modules": _ATTENTION, **options}
  return Case(base, {"r": 2, "lora_alpha": 3, **given}, **own)


def _encoder(**options: Any) -> Case:
  given = {"base": _BERT, "target_modules": ["query", "value"], **options}
  return _decoder(**given)


CASES: dict[str, Case] = {
  # Sizes and targets.
  "plain": _decoder(_UNTIED),
  "patterns": _decoder(
    _UNTIED,
    target_modules=["q_proj", "v_proj", "down_proj"],
    rank_pattern={"layers.0.self_attn.q_proj": 3, "down_proj": 1},
    alpha_pattern={"v_proj": 7, "model.layers.1.mlp.down_proj": 2},
    selective=True,
  ),
  "pattern_anchors": _decoder(
    _UNTIED, rank_pattern={r"^model\.layers\.\d+\.self_attn\.v_proj": 1}
  ),
  "regex": _decoder(
    _UNTIED, target_modules=r"model\.layers\.[01]\.self_attn\.(q|o)_proj"
  ),
  "all_linear": _decoder(
    _UNTIED, target_modules="all-linear", task_type="CAUSAL_LM"
  ),
  "exclude": _decoder(
    _UNTIED,
    target_modules=["q_proj", "o_proj", "up_proj"],
    exclude_modules=["layers.1.self_attn.q_proj", "o_proj"],
    selective=True,
  ),
  "exclude_regex": _decoder(
    _UNTIED,
    target_modules=r".*_proj",
    exclude_modules=r".*\.(mlp|self_attn\.k_proj).*",
  ),
  "layers": _decoder(_UNTIED, layers_to_transform=[1], selective=True),
  "layers_pattern": _decoder(
    _UNTIED,
    layers_to_transform=0,
    layers_pattern="layers",
    selective=True,
  ),
  "targets_it_lacks": _decoder(
    _UNTIED,
    target_modules=["c_attn", "q_proj", "query_key_value"],
    modules_to_save=["score"],
  ),
  "parameters": _decoder(_UNTIED, target_parameters=["mlp.up_proj.weight"]),
  # What a pair is multiplied by.
  "rslora": _decoder(_UNTIED, use_rslora=True, rank_pattern={"v_proj": 5}),
  "dora": _decoder(_UNTIED, target_modules=["q_proj", "o_proj"], use_dora=True),
  "dora_rslora": _decoder(
    _UNTIED,
    use_dora=True,
    use_rslora=True,
    alpha_pattern={"q_proj": 9},
    rank_pattern={"v_proj": 1},
  ),
  "dropout": _decoder(_UNTIED, lora_dropout=0.3),
  "fan_in_fan_out": _decoder(_UNTIED, fan_in_fan_out=True),
  "gaussian": _decoder(_UNTIED, init_lora_weights="gaussian"),
  "velora": _decoder(_UNTIED, velora_config={"num_groups": 4, "scale": 1.0}),
  # Whole modules.
  "saved_head": _decoder(
    _UNTIED, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
  ),
  "saved_tables": _decoder(
    _UNTIED, modules_to_save=["embed_tokens", "lm_head"]
  ),
  "saved_norms": _decoder(_UNTIED, modules_to_save=["norm"]),
  "saved_layers": _decoder(_UNTIED, modules_to_save=["mlp"]),
  "saved_tied": _decoder(
    _TIED, modules_to_save=["embed_tokens"], ensure_weight_tying=True
  ),
  "saved_tied_apart": _decoder(
    _TIED,
    modules_to_save=["lm_head"],
    refusal="embed_tokens and lm_head are trained apart.*ensure_weight_tying",
  ),
  # Heads, embeddings and tokens.
  "head": _decoder(_UNTIED, target_modules=["q_proj", "lm_head"]),
  "head_of_another_base": _decoder(
    _UNTIED,
    target_modules=["q_proj", "lm_head"],
    before=_other,
    refusal=r"lm_head\.base_layer\.weight is a copy of another base's weight",
  ),
  "head_tied": _decoder(
    _TIED,
    target_modules=["q_proj", "lm_head"],
    refusal="embed_tokens and lm_head are trained apart",
  ),
  "embedding": _decoder(_UNTIED, target_modules=["q_proj", "embed_tokens"]),
  "embedding_rslora": _decoder(
    _UNTIED,
    target_modules=["q_proj", "embed_tokens"],
    use_rslora=True,
    rank_pattern={"embed_tokens": 5},
  ),
  "embedding_tied": _decoder(
    _TIED,
    target_modules=["q_proj", "embed_tokens"],
    ensure_weight_tying=True,
  ),
  "embedding_tied_apart": _decoder(
    _TIED,
    target_modules=["q_proj", "embed_tokens"],
    refusal="embed_tokens and lm_head are trained apart",
  ),
  "embedding_dora": _decoder(
    _UNTIED,
    target_modules=["q_proj", "embed_tokens"],
    use_dora=True,
    refusal="embed_tokens is an embedding with a magnitude of DoRA's",
  ),
  "tokens": _decoder(_UNTIED, trainable_token_indices=[1, 60, 3]),
  "tokens_of_both": _decoder(
    _UNTIED,
    trainable_token_indices={"embed_tokens": [1, 3], "lm_head": [3, 2]},
  ),
  "tokens_tied": _decoder(_TIED, trainable_token_indices=[1, 60, 3]),
  "resized": _decoder(
    _UNTIED, before=_resized, refusal=r"resize_token_embeddings\(70\)"
  ),
  # Biases.
  "lora_bias": _decoder(_UNTIED, lora_bias=True),
  "lora_bias_without_one": _decoder(
    _TIED,
    lora_bias=True,
    refusal="q_proj has a lora_bias and, in this model, no bias",
  ),
  "bias_all": _decoder(_UNTIED, bias="all"),
  "bias_lora_only": _decoder(_UNTIED, bias="lora_only"),
  # Spellings.
  "bfloat16": _decoder(
    _UNTIED,
    after=_tensors(lambda name, x: (name, x.to(torch.bfloat16))),
  ),
  "adapter_name_inside": _decoder(
    _UNTIED,
    use_dora=True,
    modules_to_save=["lm_head"],
    reads=False,
    after=_tensors(
      lambda name, x: (
        name.replace(".weight", ".default.weight")
        .replace("_vector", "_vector.default")
        .replace("lm_head.default", "lm_head.modules_to_save.default"),
        x,
      )
    ),
  ),
  "old": _decoder(_UNTIED, after=_only(*_OLD), task_type="CAUSAL_LM"),
  "pickle": _decoder(_UNTIED, after=_pickled, refusal="a pickle, which can"),
  "two_in_one": _decoder(
    _UNTIED,
    after=lambda folder: safetensors.torch.save_file(
      {
        name.replace(".weight", f".{own}.weight"): x + (own == "second")
        for name, x in safetensors.torch.load_file(folder / _TENSORS).items()
        for own in ("first", "second")
      },
      folder / _TENSORS,
    ),
    refusal="holds several adapters.*first.*second",
  ),
  # Encoders.
  "encoder": _encoder(target_modules=["query", "dense"], task_type="TOKEN_CLS"),
  "encoder_biases": _encoder(bias="all", task_type="TOKEN_CLS"),
  "encoder_norms": _encoder(
    modules_to_save=["LayerNorm", "classifier"], task_type="TOKEN_CLS"
  ),
  "encoder_embedding": _encoder(
    target_modules=["query", "word_embeddings"], task_type="TOKEN_CLS"
  ),
  "bare_encoder": _encoder(target_modules=["query", "dense"], head="none"),
  # Heads for sequences.
  "sequence_encoder": _encoder(
    base=_POOLED,
    target_modules=["query", "dense"],
    task_type="SEQ_CLS",
    head="sequence",
  ),
  "sequence_decoder": _decoder(_UNTIED, task_type="SEQ_CLS", head="sequence"),
  "sequence_decoder_dora": _decoder(
    _TIED,
    task_type="SEQ_CLS",
    target_modules="all-linear",
    use_dora=True,
    head="sequence",
  ),
  # What is no LoRA of the model.
  "pissa": _decoder(
    _UNTIED,
    init_lora_weights="pissa",
    refusal="init_lora_weights.*'pissa'.*convert the adapter to a plain LoRA",
  ),
  "replicated": _decoder(
    _UNTIED,
    layer_replication=[[0, 2], [1, 2]],
    refusal="layer_replication.*a base whose layers are repeated",
  ),
  "activated": _decoder(
    _UNTIED,
    alora_invocation_tokens=[3, 4],
    task_type="CAUSAL_LM",
    refusal="alora_invocation_tokens.*tokens after some others",
  ),
  "kasa": _decoder(
    _UNTIED,
    kasa_config={"beta": 1e-4, "gamma": 1e-3},
    refusal="kasa_config.*without its least singular values",
  ),
  "ia3": Case(
    _UNTIED,
    {"target_modules": ["k_proj"], "feedforward_modules": []},
    kind=peft.IA3Config,
    refusal="peft_type is 'LORA'; got 'IA3'",
  ),
  "loha": Case(
    _UNTIED,
    {"r": 2, "target_modules": ["k_proj"]},
    kind=peft.LoHaConfig,
    refusal="peft_type is 'LORA'; got 'LOHA'",
  ),
  "of_the_future": _decoder(
    _UNTIED,
    after=_change(use_waves=True, peft_version="9.9.0"),
    refusal=r"use_waves=True is unknown here.*PEFT 9\.9\.0.*0\.21\.2",
  ),
}

COMMITTED = (
  *("patterns", "exclude", "dora", "saved_head", "saved_norms", "head"),
  *("head_of_another_base", "embedding", "embedding_tied", "tokens_tied"),
  *("resized", "lora_bias", "bias_lora_only", "adapter_name_inside", "old"),
  *("encoder_embedding", "bare_encoder", "of_the_future"),
  *("sequence_encoder", "sequence_decoder"),
)


def base(case: Case) -> Model:
  """The base of a case, as published."""
  folder, options = DATA / case.base, {"dtype": torch.float32}
  if case.head == "none":
    return transformers.AutoModel.from_pretrained(folder, **options)
  if case.head == "sequence":
    return transformers.AutoModelForSequenceClassification.from_pretrained(
      folder, num_labels=3, **options
    )
  if case.base == _BERT:
    auto = transformers.AutoModelForTokenClassification
    return auto.from_pretrained(folder, **options)
  return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def write_pooled() -> None:
  """A BERT with its pooler, that the others have not."""
  torch.manual_seed(0)
  config = make_peft_references.bert_config()
  model = transformers.BertModel(config)
  parts = ("bias", "Norm")
  make_peft_references.randomised(model, *parts).save_pretrained(DATA / _POOLED)


def randomised(model: Model) -> Model:
  """Moves all that an adapter trains: zeros and ones would hide a mistake."""
  torch.manual_seed(1)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if value.requires_grad or "lora_" in name:
        value += 0.2 * torch.randn_like(value)
  return model.eval()


def logits(case: Case, model: Model, tokens: np.ndarray) -> np.ndarray:
  """Of one row, (L, V) or (labels,); of a bare encoder by its base's head."""
  with torch.no_grad():
    found = model(torch.tensor(tokens)[None])
    if case.head != "none":
      return found.logits[0].numpy()
    head = base(dataclasses.replace(case, head="own")).classifier
    return head(found.last_hidden_state)[0].numpy()


def write(name: str, folder: Folder) -> None:
  """Writes a case, and what PEFT computes with what it reads there."""
  case = CASES[name]
  own = folder / "adapter"
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = peft.get_peft_model(
      case.before(base(case)), case.kind(**case.options)
    )
    randomised(model).save_pretrained(own)
    (own / "README.md").unlink(missing_ok=True)
    _name_base(own, case.base)
    case.after(own)
    tokens = np.random.default_rng(0).integers(0, 31, LENGTH).astype(np.int32)
    arrays = {"tokens": tokens}
    if not case.refusal:
      if case.reads:
        model = peft.PeftModel.from_pretrained(case.before(base(case)), own)
      arrays["logits"] = logits(case, model.eval(), tokens)
      plain = logits(case, case.before(base(case)).eval(), tokens)
      assert np.abs(arrays["logits"] - plain).max() > 0.05, name
  np.savez_compressed(folder / "reference.npz", **arrays)


def _name_base(folder: Folder, base: str) -> None:
  """In place of where it is on this machine."""
  path = folder / _CONFIG
  config = json.loads(path.read_text()) | {"base_model_name_or_path": base}
  # Sets are written in the order of this process.
  for key in ("target_modules", "modules_to_save"):
    if isinstance(config.get(key), list):
      config[key] = sorted(config[key])
  path.write_text(json.dumps(config, indent=2))


def facts(name: str) -> dict[str, Any]:
  """What a test of a case has to know."""
  case = CASES[name]
  return {
    "base": case.base,
    "refusal": case.refusal,
    "selective": case.selective,
    # Of a bare model it is the program's own.
    "head": "sequence" if case.head == "sequence" else "own",
  }


def main() -> None:
  write_pooled()
  shutil.rmtree(OUT, ignore_errors=True)
  for name in CASES:
    with tempfile.TemporaryDirectory() as temporary:
      folder = (OUT if name in COMMITTED else pathlib.Path(temporary)) / name
      write(name, folder)
      size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
      print(f"{name}: {size} bytes")
  text = json.dumps({name: facts(name) for name in COMMITTED}, indent=2)
  (OUT / "cases.json").write_text(text + "\n")


if __name__ == "__main__":
  main()
