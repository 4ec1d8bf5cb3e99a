"""Loading a pretrained model: module, variables and tokenizer in one call."""

from typing import Any

from flax import linen as nn
import jax
from jax import typing
import jax.numpy as jnp
import tokenizers

from train.models import bert, bert_weights, tokenizer, weights


def load_bert(
  name: str,
  num_classes: int,
  key: int | jax.Array,
  dtype: typing.DTypeLike | None = None,
  pooling: str = "mean",
  remat: bool = False,
) -> tuple[bert.BertClassifier, dict[str, Any], tokenizers.Tokenizer]:
  """A BERT classifier: pretrained encoder, fresh head.

  Args:
    name: a folder, 'minilm', 'package:NAME' or a hub name; see
      `weights.locate`.
    num_classes: outputs of the head.
    key: seed or PRNG key of the head's kernel; its bias is zeros.
    dtype: compute dtype of the encoder; parameters are float32 all the same.
    pooling: 'mean' or 'cls'.
    remat: recompute each layer's activations in the backward pass.

  Returns:
    The module, its variables {'params': {'encoder', 'head'}}, and the
    tokenizer.

  Raises:
    WeightsError: the model cannot be found, read, or fitted together.
  """
  folder = weights.locate(name)
  try:
    config = bert.BertConfig.from_hf(weights.read_config(folder))
  except weights.WeightsError:
    raise
  except ValueError as error:
    raise weights.WeightsError(f"{folder / 'config.json'}: {error}") from error
  text_tokenizer = tokenizer.load_tokenizer(folder)
  if text_tokenizer.get_vocab_size() > config.vocab_size:
    raise weights.WeightsError(
      f"The tokenizer in {folder} has {text_tokenizer.get_vocab_size()} tokens "
      f"and the model's vocab_size is {config.vocab_size}; they belong to "
      "different models."
    )
  encoder = bert_weights.bert_params(config, weights.read_safetensors(folder))
  if isinstance(key, int):
    key = jax.random.key(key)
  shape = (config.hidden_size, num_classes)
  head = {
    "kernel": nn.initializers.lecun_normal()(key, shape, jnp.float32),
    "bias": jnp.zeros(num_classes),
  }
  model = bert.BertClassifier(config, num_classes, dtype, pooling, remat)
  return model, {"params": {"encoder": encoder, "head": head}}, text_tokenizer
