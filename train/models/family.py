"""What a family of models is, and a model of one: opened, its weights unread.

To add a family is to write one file with a `Family`, and to `register` it.
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
"""How many labels a new head has, or the tokens that each label is said by."""


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a model is in transformers and in PEFT.

  Attributes:
    architecture: its class.
    names: from paths of parameters, and of the head, to modules; for `peft`.
    prefix: what the names of the bare model lack.
    task_type: PEFT's; None if it has none.
    first: of a classifier of tokens, whether our logits are those of the first
      token, and not the mean over all.
    idle: ends of names of modules that it lacks and computes the same without.
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
  """All that the program knows of a family of models.

  A classifier that answers by a new head has it as its module `head`, a
  `Dense` from the config's `hidden_size` to the model's `num_classes`. A
  language model has the head that it came with. The config of a family that
  reads images has `patch_size`, `grid`, `side`, `mean` and `deviation`, as
  `vit.config.VitConfig` has them.

  Attributes:
    name: as sentences have it: 'BERT'.
    reads: what its models read.
    answers: what a classifier's logits are of. 'head': the labels, by a new
      head; 'token': the labels, by the first token of each one's word; 'words':
      all tokens of the words, (B, M, V).
    config: the sizes; `from_hf` makes them of a config.json, and raises a
      ValueError that says what is wrong.
    modules: the classes of its models.
    classifier: `(config, labels, **options)` to a model with `features`;
      the options are `dtype`, `param_dtype`, `remat` and, if the family
      `scans`, `scan`.
    check: of a config and tensors, refuses tensors that are not all there, of
      the config's sizes and floats, by a WeightsError. It is called when a
      model is opened: before a model of a billion layers is built, say.
    params: `(model, tensors, dtype, place)` to the parameters that the tensors
      hold: all but a new head.
    example_inputs: of a config, the shapes of what its models are given.
    logical_axes: of a model's variables, names of their axes.
    model_types: of the config.json's that it opens.
    sequence_types: of those that it opens for `--head sequence`.
    suffix: of the files that `read_file` reads, as '.onnx'.
    read_file: of a path, the config, the tensors and the config.json.
    complete: adds to what was opened from a folder the tokens that pad and end
      its texts, and a template.
    language_model: `(config, **options)`, as `classifier`; None if it has none.
    label_tokens: `(pretrained, words, after)` to the tokens that each word is
      said by, where it follows a prompt that ends in `after`; None if it
      answers by a new head.
    converses: whether it learns what follows in conversations, token by token.
    own_head: of a model, the module of the head that it came with, which no
      adapters are put on; None if it has none of its own.
    generate: `(model, apply, tokens, mask, max_new_tokens, **sampling)` to the
      new tokens; None if it does not generate.
    generate_methods: of the model, that `generate` calls.
    scans: whether it can compile one layer for all.
    splits_rows: whether devices can share the tokens of a row.
    head_bias: whether a new head has a bias.
    sizes: of published models, by name.
    kind: of a model, what it is in transformers; None if it is not there.
    tensors: `(model, params)` to the tensors that it has there.
    carried: of a config and the tensors that were read, those that our model
      has not and transformers' has, by their names there: arrays, unchanged.
    exported: of these tensors, what config.json has to say of them.
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
    """Whether a classifier's head is new, and is trained as it is."""
    return self.answers == "head"

  def kind_of(self, model: nn.Module) -> Kind:
    """What a model is in transformers.

    Raises:
      ValueError: if it is not there.
    """
    if self.kind is None:
      raise ValueError(f"transformers has no {type(model).__name__}.")
    return self.kind(model)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """A model on disk, of which no weight is read yet.

  Attributes:
    path: its folder, or its one file.
    family: what it is.
    config: the sizes, of the family's `config`.
    tensors: weights by Hugging Face's names, read when they are indexed.
    text_tokenizer: without truncation and padding; None for images.
    pad_id: the token that pads.
    eos_id: the token that ends a turn or a text, if it has one.
    stop_ids: all tokens that generation ends at, `eos_id` among them.
    template: of conversations; None if the family holds none.
    hf_config: the configuration as transformers has it, in its config.json.
    notes: sentences for the user, of what was found in it.
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
    """The model's, without truncation and padding.

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
    """The tokens that each label is said by, as `classifier` takes them.

    Args:
      words: of each label.
      after: how a prompt ends that is answered by one of them.

    Raises:
      ValueError: if they cannot be told apart.
    """
    assert self.family.label_tokens is not None
    return self.family.label_tokens(self, words, after)

  def classifier(self, labels: Labels, **options: Any) -> nn.Module:
    """A model that tells labels apart.

    Args:
      labels: how many, for a new head; or from `label_tokens`.
      **options: `dtype`, of the products, None being float32; `param_dtype`, of
        the weights; `remat`, what a layer's backward pass computes again; and
        `scan`, whether one layer is compiled for all.

    Raises:
      ValueError: if there is no such model of the family.
    """
    self._check(options)
    return self.family.classifier(self.config, labels, **options)

  def language_model(self, **options: Any) -> nn.Module:
    """A model that tells the next token; the options are `classifier`'s.

    Raises:
      ValueError: if there is no such model of the family.
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
    """The variables of a model that was made here, read one at a time.

    Args:
      model: from `classifier` or `language_model`.
      key: seed or PRNG key of a new head's kernel; its bias is zeros.
      dtype: of the weights.
      place: makes an array of what is read; by default on one device.
      adapted: the model with adapters; if they are for a quantised base, each
        of its weights is quantised before the next one is read.

    Raises:
      WeightsError: the weights do not fit the configuration.
      RunError: they are not finite.
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
    """Shapes of what a model is given, for `bilora_jax.adapt`."""
    return self.family.example_inputs(self.config)

  def logical_axes(self, variables: Any) -> Any:
    """Names of the axes of a model's variables, of which shapes are enough.

    Returns:
      A tree like `variables` of `jax.sharding.PartitionSpec`.
    """
    return self.family.logical_axes(variables)

  def kind(self, model: nn.Module) -> Kind:
    """What a model is in transformers; `Family.kind_of`."""
    return self.family.kind_of(model)

  def tensors_of(
    self, model: nn.Module, params: Mapping[str, Any]
  ) -> dict[str, Any]:
    """The tensors of the model in transformers, a linear weight (out, in)."""
    assert self.family.tensors is not None
    carried = self.family.carried(self.config, self.tensors)
    return self.family.tensors(model, params) | carried

  def exported_config(
    self,
    model: nn.Module,
    tensors: Mapping[str, Any],
    labels: Sequence[str] = (),
  ) -> dict[str, Any]:
    """The config.json of a model that is written for transformers.

    Args:
      model: from `classifier` or `language_model`.
      tensors: from `tensors_of`.
      labels: of a new head.
    """
    gone = ("dtype", "_name_or_path", "num_labels", "quantization_config")
    config = {k: v for k, v in self.hf_config.items() if k not in gone}
    config |= {
      "architectures": [self.kind(model).architecture],
      # That of the layers; a head may be wider.
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
    """Answers batches of prompts.

    Args:
      model: from `language_model`.
      apply: calls it by the family's `generate_methods`: a
        `functools.partial` of `model.apply` or of `adapted.apply`.
      **sampling: `max_new_tokens`, `temperature`, `top_k` and `top_p`.

    Returns:
      From tokens and their mask, (B, L), and a `key` to draw with, to new
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
