"""The records of a family of models, and of an opened model of a family.

To add a family, write one file with a `Family`, and `register` it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, Literal

from flax import linen as nn
import jax
from jax import typing
import jax.numpy as jnp
import tokenizers

from bilora_jax import Adapted

from .io import stored, tensors, weights
from .io import template as templates

Labels = int | Sequence[Sequence[int]]
"""The number of labels of a new head, or the tokens of each label's word."""


@dataclasses.dataclass(frozen=True)
class Kind:
  """How transformers and PEFT represent a model.

  Attributes:
    architecture: the model's class in transformers.
    names: from paths of parameters, and of the head, to modules; for `peft`.
    prefix: the prefix that the names of the bare model lack.
    task_type: the task type in PEFT; None if PEFT has none for the model.
    first: for a token classifier, whether our logits are those of the first
      token; if not, they are the mean over all tokens.
    idle: the ends of names of modules that the class lacks, and that do not
      change its results.
  """

  architecture: str
  names: dict[str, Any]
  prefix: str
  task_type: str | None
  first: bool = False
  idle: tuple[str, ...] = ()


def _same(pretrained: "Pretrained") -> "Pretrained":
  return pretrained


def _fits(config: Any, tensors: Mapping[str, Any]) -> None:
  del config, tensors


def _no_head(model: Any) -> None:
  del model


def _none_carried(config: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
  del config, tensors
  return {}


def _nothing(tensors: Mapping[str, Any]) -> dict[str, Any]:
  del tensors
  return {}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Family:
  """The record of a family of models: all that the program knows of it.

  A classifier with a new head has it as the module `head`, a `Dense` from the
  config's `hidden_size` to the model's `num_classes`. A language model keeps
  its pretrained head. The config of a family that reads images has
  `patch_size`, `grid`, `side`, `mean` and `deviation`, as
  `vit.config.VitConfig`.

  Attributes:
    name: the name in messages, such as 'BERT'.
    reads: what the models read.
    answers: what a classifier's logits are for. 'head': the labels, from a new
      head. 'token': the labels, from the first token of each label's word.
      'words': all tokens of the words, (B, M, V).
    config: the class of the sizes. Its `from_hf` takes a config.json, and
      raises a ValueError that says what is wrong.
    modules: the classes of the models.
    classifier: from `(config, labels, **options)` to a model with `features`.
      The options are `dtype`, `param_dtype` and `remat`, and `scan` if the
      family `scans`.
    check: takes a config and tensors. It raises a WeightsError unless all
      tensors are there, are floats and have the config's sizes. It runs when a
      model is opened, before a model of a wrong size is built.
    params: from `(model, tensors, dtype, place)` to all parameters except those
      of a new head.
    example_inputs: from a config to the shapes of the models' inputs.
    logical_axes: from a model's variables to the names of their axes.
    model_types: the values of config.json's `model_type` that it opens.
    sequence_types: the values that it opens for `--head sequence`.
    suffix: the end of the names of files that `read_file` reads, such as
      '.onnx'.
    read_file: from a path to the config, the tensors and the config.json.
    complete: adds the padding and end tokens and the template to a model that
      was opened from a folder.
    language_model: from `(config, **options)` to a model, as `classifier`; None
      if the family has no language models.
    label_tokens: from `(pretrained, words, after)` to the tokens of each word,
      after a prompt that ends in `after`; None if there is a new head.
    converses: whether it can learn the responses of conversations.
    own_head: from a model to the module of its pretrained head, which gets no
      adapters; None if the model has no such head.
    generate: from `(model, apply, tokens, mask, max_new_tokens, **sampling)` to
      the new tokens; None if the models do not generate.
    generate_methods: the methods of the model that `generate` calls.
    scans: whether one layer can be compiled for all layers.
    splits_rows: whether devices can share the tokens of a row.
    head_bias: whether a new head has a bias.
    sizes: the sizes of published models, by name.
    kind: from a model to its `Kind` in transformers; None if transformers has
      no such models.
    tensors: from `(model, params)` to the tensors of transformers' model.
    carried: from a config and the tensors of the folder to those that only
      transformers' model has. They are exported unchanged, by its names.
    exported: from the exported tensors to further keys of config.json.
  """

  name: str
  reads: Literal["texts", "images"]
  answers: Literal["head", "token", "words"]
  config: Any
  modules: tuple[type[nn.Module], ...]
  classifier: Callable[..., nn.Module]
  params: Callable[..., dict[str, Any]]
  example_inputs: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]
  logical_axes: Callable[[Any], Any]
  model_types: tuple[str, ...] = ()
  sequence_types: tuple[str, ...] = ()
  suffix: str = ""
  read_file: Callable[[pathlib.Path], tuple[Any, Any, Any]] | None = None
  check: Callable[[Any, Mapping[str, tensors.Tensor]], None] = _fits
  complete: Callable[["Pretrained"], "Pretrained"] = _same
  language_model: Callable[..., nn.Module] | None = None
  label_tokens: Callable[..., tuple[tuple[int, ...], ...]] | None = None
  converses: bool = False
  own_head: Callable[[Any], str | None] = _no_head
  generate: Callable[..., jax.Array] | None = None
  generate_methods: tuple[str, ...] = ()
  scans: bool = False
  splits_rows: bool = False
  head_bias: bool = True
  sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  kind: Callable[[Any], Kind] | None = None
  tensors: Callable[..., dict[str, Any]] | None = None
  carried: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = _none_carried
  exported: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing

  @property
  def has_new_head(self) -> bool:
    """Whether a classifier has a new head, which is trained in full."""
    return self.answers == "head"

  def kind_of(self, model: nn.Module) -> Kind:
    """Returns how transformers represents a model.

    Raises:
      ValueError: if transformers has no such model.
    """
    if self.kind is None:
      raise ValueError(f"transformers has no {type(model).__name__}.")
    return self.kind(model)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """An opened model on disk; no weight is read yet.

  Attributes:
    path: the model's folder or single file.
    family: the model's family.
    config: the sizes, an instance of the family's `config`.
    tensors: the weights by Hugging Face's names, read when they are indexed.
    text_tokenizer: the tokenizer, without truncation and padding; None for
      images.
    pad_id: the id of the padding token.
    eos_id: the id of the token that ends a turn or a text, if there is one.
    stop_ids: the ids of all tokens that end generation, with `eos_id`.
    template: the chat template; None if the family has no conversations.
    hf_config: the configuration in transformers' form, its config.json.
    notes: sentences for the user on what was found in the model.
  """

  path: pathlib.Path
  family: Family
  config: Any
  tensors: Mapping[str, tensors.Tensor]
  text_tokenizer: tokenizers.Tokenizer | None = None
  pad_id: int = 0
  eos_id: int | None = None
  stop_ids: tuple[int, ...] = ()
  template: templates.Template | None = None
  hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The model's tokenizer, without truncation and padding.

    Raises:
      ValueError: if the model reads images.
    """
    if self.text_tokenizer is None:
      raise ValueError(
        f"The model {self.path} is a {self.family.name}, which reads "
        f"{self.family.reads} and no texts."
      )
    return self.text_tokenizer

  def label_tokens(
    self, words: Sequence[str], after: str
  ) -> tuple[tuple[int, ...], ...]:
    """Returns the tokens of each label's word, as `classifier` takes them.

    Args:
      words: the word of each label.
      after: the end of the prompt that a word answers.

    Raises:
      ValueError: if the model cannot distinguish the words.
    """
    assert self.family.label_tokens is not None
    return self.family.label_tokens(self, words, after)

  def classifier(self, labels: Labels, **options: Any) -> nn.Module:
    """Returns a classifier of this model's family and sizes.

    Args:
      labels: the number of labels, for a new head; or from `label_tokens`.
      **options: `dtype`, the dtype of products (None is float32);
        `param_dtype`, the dtype of weights; `remat`, what a layer's backward
        pass computes again; and `scan`, whether one layer is compiled for all.

    Raises:
      ValueError: if the family does not support the options.
    """
    self._check(options)
    return self.family.classifier(self.config, labels, **options)

  def language_model(self, **options: Any) -> nn.Module:
    """Returns a model that predicts the next token.

    Args:
      **options: as of `classifier`.

    Raises:
      ValueError: if the family has no language models, or does not support the
        options.
    """
    self._check(options)
    if self.family.language_model is None:
      raise ValueError(
        f"The model {self.path} is a {self.family.name}, which is no language "
        "model."
      )
    return self.family.language_model(self.config, **options)

  def variables(
    self,
    model: nn.Module,
    key: int | jax.Array = 0,
    dtype: typing.DTypeLike = jnp.float32,
    place: stored.Place = stored.on_one_device,
    adapted: Adapted | None = None,
  ) -> dict[str, Any]:
    """Reads the variables of a model, one at a time.

    Args:
      model: from `classifier` or `language_model`.
      key: the seed or PRNG key of a new head's kernel; its bias is zeros.
      dtype: the dtype of the weights.
      place: makes an array of the values that are read; by default on one
        device.
      adapted: the model with adapters. If the base is to be quantised, each
        weight is quantised before the next one is read.

    Raises:
      WeightsError: the weights do not fit the configuration.
      RunError: a weight is not finite.
    """
    place = stored.finite(place, self.path)
    if adapted is not None and adapted.spec.base_dtype is not None:
      place = stored.quantising(place, adapted)
    try:
      params = self.family.params(model, self.tensors, dtype, place)
    except weights.WeightsError as error:
      raise weights.WeightsError(f"{self.path}: {error}") from error
    if self.family.has_new_head:
      if isinstance(key, int):
        key = jax.random.key(key)
      shape = (self.config.hidden_size, model.num_classes)
      kernel = nn.initializers.lecun_normal()(key, shape, jnp.float32)
      head = {"kernel": kernel}
      if self.family.head_bias:
        head["bias"] = jnp.zeros(shape[1])
      params |= stored.placed({"head": head}, dtype, place)
    return {"params": params}

  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the shapes of a model's inputs, for `bilora_jax.adapt`."""
    return self.family.example_inputs(self.config)

  def logical_axes(self, variables: Any) -> Any:
    """Returns the names of the axes of a model's variables.

    Args:
      variables: the variables, or their shapes.

    Returns:
      A tree like `variables`, with a `jax.sharding.PartitionSpec` for each.
    """
    return self.family.logical_axes(variables)

  def kind(self, model: nn.Module) -> Kind:
    """Returns how transformers represents a model; see `Family.kind_of`."""
    return self.family.kind_of(model)

  def tensors_of(
    self, model: nn.Module, params: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the tensors of transformers' model; linear weights (out, in)."""
    assert self.family.tensors is not None
    carried = self.family.carried(self.config, self.tensors)
    return self.family.tensors(model, params) | carried

  def exported_config(
    self,
    model: nn.Module,
    tensors: Mapping[str, Any],
    labels: Sequence[str] = (),
  ) -> dict[str, Any]:
    """Returns the config.json of a model that is exported to transformers.

    Args:
      model: from `classifier` or `language_model`.
      tensors: from `tensors_of`.
      labels: the names of a new head's labels.
    """
    gone = ("dtype", "_name_or_path", "num_labels", "quantization_config")
    config = {k: v for k, v in self.hf_config.items() if k not in gone}
    config |= {
      "architectures": [self.kind(model).architecture],
      # The dtype of the layers; a head may have a wider one.
      "torch_dtype": next(iter(tensors.values())).dtype.name,
      **self.family.exported(tensors),
    }
    if labels:
      config["id2label"] = {str(i): label for i, label in enumerate(labels)}
      config["label2id"] = {label: i for i, label in enumerate(labels)}
    return config

  def generator(
    self, model: nn.Module, apply: Callable[..., Any], **sampling: Any
  ) -> Callable[..., jax.Array]:
    """Returns a function that answers batches of prompts.

    Args:
      model: from `language_model`.
      apply: a `functools.partial` of `model.apply` or of `adapted.apply`, which
        can call the family's `generate_methods`.
      **sampling: `max_new_tokens`, `temperature`, `top_k` and `top_p`.

    Returns:
      A function from tokens and their mask, (B, L), and a PRNG `key` to the new
      tokens, (B, T).

    Raises:
      ValueError: if models of the family do not generate.
    """
    generate = self.family.generate
    if generate is None:
      raise ValueError(
        f"The model {self.path} is a {self.family.name}, which does not "
        "generate."
      )

    def answer(tokens, mask, key=None):
      return generate(
        model, apply, tokens, mask, key=key, stop_ids=self.stop_ids, **sampling
      )

    return answer

  def _check(self, options: Mapping[str, Any]) -> None:
    if options.get("scan") and not self.family.scans:
      raise ValueError(
        "--scan-layers is for models whose layers can be compiled as one; "
        f"{self.path} is a {self.family.name}, which is an encoder."
      )
