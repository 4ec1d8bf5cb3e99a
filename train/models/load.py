"""Opening a pretrained model: what it is at once, its weights when asked."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from flax import linen as nn
import jax
from jax import typing
import jax.numpy as jnp
import tokenizers

from .bert import model as bert
from .bert import weights as bert_weights
from .decoder import config as decoder_config
from .decoder import label_words
from .decoder import model as decoder
from .decoder import weights as decoder_weights
from .io import (
  gguf_file,
  gguf_tokenizer,
  spiece,
  stored,
  tensors,
  tokenizer,
  weights,
)
from .io import template as templates
from .t5 import config as t5_config
from .t5 import label_words as t5_label_words
from .t5 import model as t5
from .t5 import weights as t5_weights
from .vit import model as vit
from .vit import weights as vit_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """A model on disk, of which no weight is read yet.

  Attributes:
    path: its folder, or its GGUF or ONNX file.
    config: the sizes; a `BertConfig` is an encoder, a `DecoderConfig` a
      decoder, a `T5Config` both, a `VitConfig` an encoder of images.
    tensors: weights by Hugging Face's names, read when they are indexed.
    text_tokenizer: without truncation and padding; None for images.
    pad_id: the token that pads.
    eos_id: the token that ends a turn or a text, if it has one.
    template: of conversations; None but for a decoder.
    hf_config: the configuration as transformers has it, in its config.json.
  """

  path: pathlib.Path
  config: (
    bert.BertConfig
    | decoder_config.DecoderConfig
    | t5_config.T5Config
    | vit.VitConfig
  )
  tensors: Mapping[str, tensors.Tensor]
  text_tokenizer: tokenizers.Tokenizer | None = None
  pad_id: int = 0
  eos_id: int | None = None
  template: templates.Template | None = None
  hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def is_decoder(self) -> bool:
    return isinstance(self.config, decoder_config.DecoderConfig)

  @property
  def is_t5(self) -> bool:
    return isinstance(self.config, t5_config.T5Config)

  @property
  def is_vision(self) -> bool:
    return isinstance(self.config, vit.VitConfig)

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The model's, without truncation and padding.

    Raises:
      ValueError: if the model reads images.
    """
    if self.text_tokenizer is None:
      raise ValueError(
        f"The model {self.path} reads images; texts are for a BERT, a T5, a "
        "Llama or a Qwen 2."
      )
    return self.text_tokenizer

  def encoder_classifier(
    self,
    num_classes: int,
    dtype: typing.DTypeLike | None = None,
    **options: Any,
  ) -> bert.BertClassifier | vit.VitClassifier:
    """An encoder with a head on what it makes of a text, or of an image.

    Args:
      num_classes: outputs of the head.
      dtype: compute dtype of the encoder; None is float32.
      **options: `pooling` and `remat` of the classifier.
    """
    if isinstance(self.config, vit.VitConfig):
      return vit.VitClassifier(self.config, num_classes, dtype, **options)
    assert isinstance(self.config, bert.BertConfig)
    return bert.BertClassifier(self.config, num_classes, dtype, **options)

  def decoder_classifier(
    self, label_ids: Sequence[int], **options: Any
  ) -> label_words.LabelWords:
    """A decoder whose answer is one of these tokens; options of `Decoder`."""
    assert isinstance(self.config, decoder_config.DecoderConfig)
    return label_words.LabelWords(
      self.config, label_ids=tuple(label_ids), **options
    )

  def t5_classifier(
    self, words: Sequence[Sequence[int]], **options: Any
  ) -> t5_label_words.T5LabelWords:
    """A T5 whose answer is one of these words, in tokens; options of `T5`."""
    assert isinstance(self.config, t5_config.T5Config)
    return t5_label_words.T5LabelWords(
      self.config, words=tuple(map(tuple, words)), **options
    )

  def t5(self, **options: Any) -> t5.T5:
    """An encoder and a decoder; options of `T5`."""
    assert isinstance(self.config, t5_config.T5Config)
    return t5.T5(self.config, **options)

  def language_model(self, **options: Any) -> decoder.Decoder:
    """A decoder; options of `Decoder`."""
    assert isinstance(self.config, decoder_config.DecoderConfig)
    return decoder.Decoder(self.config, **options)

  def variables(
    self,
    model: nn.Module,
    key: int | jax.Array,
    dtype: typing.DTypeLike = jnp.float32,
    place: stored.Place = stored.on_one_device,
  ) -> dict[str, Any]:
    """The variables of a model that was made here, one at a time.

    Args:
      model: from one of the functions above.
      key: seed or PRNG key of a new head's kernel; its bias is zeros.
      dtype: of the weights.
      place: makes an array of what is read; by default on one device.

    Raises:
      WeightsError: the weights do not fit the configuration.
    """
    if isinstance(model, decoder.Decoder | t5.T5):
      kind: Any = t5_weights if isinstance(model, t5.T5) else decoder_weights
      params = kind.params(
        model.config, self.tensors, scan=model.scan, dtype=dtype, place=place
      )
      return {"params": params}
    arrays = tensors.read_all(self.tensors)
    if isinstance(model, vit.VitClassifier):
      encoder = vit_weights.vit_params(model.config, arrays)
    else:
      assert isinstance(model, bert.BertClassifier)
      encoder = bert_weights.bert_params(model.config, arrays)
    if isinstance(key, int):
      key = jax.random.key(key)
    shape = (model.config.hidden_size, model.num_classes)
    head = {
      "kernel": nn.initializers.lecun_normal()(key, shape, jnp.float32),
      "bias": jnp.zeros(model.num_classes),
    }
    whole = {"encoder": encoder, "head": head}
    return {"params": stored.placed(whole, dtype, place)}


def logical_axes(variables: Any) -> Any:
  """Names of the axes of a model's variables, of any kind.

  Returns:
    A tree like `variables` of `jax.sharding.PartitionSpec`.
  """
  if "shared" in variables["params"]:
    return t5.logical_axes(variables)
  encoder = variables["params"].get("encoder")
  if encoder is None:
    return decoder.logical_axes(variables)
  kind = vit if "patch" in encoder["embeddings"] else bert
  return kind.logical_axes(variables)


def open_pretrained(name: str) -> Pretrained:
  """Finds a model and reads all but its weights.

  Args:
    name: a folder, a GGUF or ONNX file, 'minilm', 'smollm2', 'vit',
      'package:NAME' or a hub name; see `weights.locate`.

  Raises:
    WeightsError: the model cannot be found, read, or fitted together.
  """
  path = weights.locate(name)
  if path.is_file() and path.suffix == ".onnx":
    return _open_onnx(path)
  found = _open_gguf(path) if path.is_file() else _open_folder(path)
  assert not isinstance(found.config, vit.VitConfig)
  size = found.tokenizer.get_vocab_size()
  if size > found.config.vocab_size:
    raise weights.WeightsError(
      f"The tokenizer of {path} has {size} tokens and the model's vocab_size "
      f"is {found.config.vocab_size}; they belong to different models."
    )
  return found


def _open_onnx(path: pathlib.Path) -> Pretrained:
  arrays = vit_weights.read(path)
  try:
    config = vit_weights.config(arrays)
  except weights.WeightsError as error:
    raise weights.WeightsError(f"{path}: {error}") from error
  return Pretrained(
    path=path,
    config=config,
    tensors=arrays,
    hf_config=vit_weights.hf_config(config),
  )


def _open_gguf(path: pathlib.Path) -> Pretrained:
  model = gguf_file.open_gguf(path)
  text_tokenizer = gguf_tokenizer.tokenizer(model)
  eos_id = model.eos_id
  pad_id = model.pad_id if model.pad_id is not None else eos_id or 0

  def text(token_id: int | None) -> str:
    return text_tokenizer.id_to_token(token_id) or "" if token_id else ""

  return Pretrained(
    path=path,
    config=_config(decoder_config.DecoderConfig, model.config, path),
    tensors=model.tensors,
    text_tokenizer=text_tokenizer,
    pad_id=pad_id,
    eos_id=eos_id,
    template=templates.Template(
      model.chat_template or templates.PLAIN,
      text(model.bos_id),
      text(eos_id),
    ),
    hf_config=model.config,
  )


def _open_folder(folder: pathlib.Path) -> Pretrained:
  config = weights.read_config(folder)
  has_own = (folder / tokenizer.FILE).is_file()
  if has_own or not (folder / spiece.FILE).is_file():
    text_tokenizer = tokenizer.load_tokenizer(folder)
  else:
    text_tokenizer = spiece.load_tokenizer(folder)
  found = tensors.open_safetensors(folder)
  where = folder / "config.json"
  if config.get("model_type") in decoder_config.MODEL_TYPES:
    template = templates.load_template(folder)
    eos_id = text_tokenizer.token_to_id(template.eos) if template.eos else None
    return Pretrained(
      path=folder,
      config=_config(decoder_config.DecoderConfig, config, where),
      tensors=found,
      text_tokenizer=text_tokenizer,
      # What stands at padding is never seen nor learned.
      pad_id=eos_id or 0,
      eos_id=eos_id,
      template=template,
      hf_config=config,
    )
  if config.get("model_type") == t5_config.MODEL_TYPE:
    sizes = _config(t5_config.T5Config, config, where)
    return Pretrained(
      path=folder,
      config=t5_weights.with_own_head(sizes, found),
      tensors=found,
      text_tokenizer=text_tokenizer,
      pad_id=sizes.pad_id,
      eos_id=sizes.eos_id,
      hf_config=config,
    )
  if config.get("model_type") != "bert":
    raise weights.WeightsError(
      f"{where}: model_type must be bert, {t5_config.MODEL_TYPE}, "
      f"{' or '.join(decoder_config.MODEL_TYPES)}, got "
      f"{config.get('model_type')!r}."
    )
  return Pretrained(
    path=folder,
    config=_config(bert.BertConfig, config, where),
    tensors=found,
    text_tokenizer=text_tokenizer,
    pad_id=tokenizer.pad_id(text_tokenizer),
    hf_config=config,
  )


def _config(kind: Any, config: Mapping[str, Any], where: pathlib.Path) -> Any:
  try:
    return kind.from_hf(config)
  except weights.WeightsError:
    raise
  except ValueError as error:
    raise weights.WeightsError(f"{where}: {error}") from error
