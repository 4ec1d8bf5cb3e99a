"""The program's models by the names of transformers: one entry for each kind.

An encoder's head is new, and no model of transformers has it as it is here, but
these compute the same:

- BERT's, on the mean of the hidden states, as the `classifier` of a
  `BertForTokenClassification`: the mean of its logits over the real tokens is
  ours.
- the ViT's, on the class token, as the `classifier` of a
  `Dinov2ForImageClassification`, whose other inputs, the mean of the patches,
  have weights of zero.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import numpy as np

from bilora_jax import peft

from .bert import model as bert
from .bert import weights as bert_weights
from .decoder import model as decoder
from .decoder import weights as decoder_weights
from .t5 import model as t5
from .t5 import weights as t5_weights
from .vit import model as vit
from .vit import weights as vit_weights


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a model is in transformers.

  Attributes:
    architecture: its class.
    names: from paths of kernels, and of the head, to modules; for `peft`.
    prefix: what the names of the bare model lack.
    task_type: PEFT's; None if it has none.
  """

  architecture: str
  names: dict[str, Any]
  prefix: str
  task_type: str | None


def kind(model: nn.Module) -> Kind:
  """What a model that `load` made is in transformers.

  Raises:
    ValueError: if it has no counterpart there.
  """
  if isinstance(model, decoder.Decoder):
    return Kind(
      "Qwen2ForCausalLM" if model.config.qkv_bias else "LlamaForCausalLM",
      dict(decoder_weights.modules(model.config, model.scan)),
      "model.",
      "CAUSAL_LM",
    )
  if isinstance(model, t5.T5):
    return Kind(
      "T5ForConditionalGeneration",
      dict(t5_weights.modules(model.config, model.scan)),
      "",
      "SEQ_2_SEQ_LM",
    )
  if isinstance(model, bert.BertClassifier):
    _check_pooling(model, "mean")
    names = {
      f"encoder/{path}": f"bert.{name}"
      for path, name in bert_weights.modules(model.config).items()
    }
    names |= dict.fromkeys(("head/kernel", "head/bias"), "classifier")
    return Kind("BertForTokenClassification", names, "bert.", "TOKEN_CLS")
  if isinstance(model, vit.VitClassifier):
    _check_pooling(model, "cls")
    prefix = "dinov2."
    names = {
      f"encoder/{path}": f"{prefix}{name}"
      if isinstance(name, str)
      else dataclasses.replace(name, module=f"{prefix}{name.module}")
      for path, name in vit_weights.modules(model.config).items()
    }
    width = model.config.hidden_size
    head = peft.Wider("classifier", width, width)
    names |= {"head/kernel": head, "head/bias": "classifier"}
    return Kind("Dinov2ForImageClassification", names, prefix, None)
  raise ValueError(f"transformers has no {type(model).__name__}.")


def tensors(
  model: nn.Module, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """The tensors of the model in transformers, a linear weight (out, in).

  Args:
    model: as for `kind`.
    params: of the model.
  """
  if isinstance(model, decoder.Decoder):
    return decoder_weights.tensors(model.config, params, scan=model.scan)
  if isinstance(model, t5.T5):
    return t5_weights.tensors(model.config, params, scan=model.scan)
  if isinstance(model, bert.BertClassifier):
    found = bert_weights.bert_tensors(model.config, params["encoder"])
  else:
    assert isinstance(model, vit.VitClassifier)
    found = vit_weights.vit_tensors(model.config, params["encoder"])
  own = kind(model)
  found = {own.prefix + name: value for name, value in found.items()}
  weight = np.asarray(params["head"]["kernel"]).T
  head = own.names["head/kernel"]
  if isinstance(head, peft.Wider):
    weight = np.pad(weight, ((0, 0), (0, head.others)))
  found["classifier.weight"] = weight
  found["classifier.bias"] = np.asarray(params["head"]["bias"])
  return found


def is_tied(found: Mapping[str, Any]) -> bool:
  """Whether the head of a model with these tensors is its embedding's table."""
  return "lm_head.weight" not in found


def _check_pooling(model: Any, pooling: str) -> None:
  if model.pooling != pooling:
    raise ValueError(
      f"transformers has no {type(model).__name__} with pooling="
      f"{model.pooling!r}; one with {pooling!r} can be written."
    )
