"""The models and batches that steps are timed on, by name."""

import argparse
from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.data.objectives import CLASSIFICATION, NEXT_TOKEN, Objective
from train.models import load
from train.models import remat as remat_lib
from train.models.decoder import config as decoder_config
from train.models.decoder import model as decoder
from train.models.decoder import sizes

# A decoder of about a billion parameters, with the sizes of Llama 3.2 1B.
_ONE_BILLION = decoder_config.DecoderConfig(
  vocab_size=128256,
  hidden_size=2048,
  num_layers=16,
  num_heads=32,
  num_kv_heads=8,
  head_dim=64,
  intermediate_size=8192,
  max_positions=131072,
  rope_theta=500000.0,
  tied=True,
)
DECODERS = {
  "smollm2-135m": sizes.PRESETS["smollm2-135m"],
  "1b": _ONE_BILLION,
  "llama3.1-8b": sizes.PRESETS["llama3.1-8b"],
}
"""Decoders by name, in bfloat16, with scanned layers and 8 x 1024 tokens."""

_BERTS = {"minilm": 32, "minilm-256": 256}  # rows of 32 tokens
NAMES = (*_BERTS, *DECODERS)


@dataclasses.dataclass(frozen=True)
class Workload:
  """The model and the batch of a timed step.

  Attributes:
    model: a Linen module.
    variables: makes the variables of the model, on the device.
    objective: the objective of the loss.
    batch: arrays on the host.
    dtype: the dtype of the model's activations.
    multiplied: the number of parameters of the base that every token is
      multiplied by.
  """

  model: Any
  variables: Callable[[], Any]
  objective: Objective
  batch: dict[str, np.ndarray]
  dtype: Any
  multiplied: int

  @property
  def inputs(self) -> tuple[Any, ...]:
    """The arguments of the model."""
    return self.objective.inputs(self.batch)

  @property
  def tokens(self) -> int:
    """The number of tokens in a step."""
    return math.prod(self.batch["tokens"].shape)

  @property
  def model_flops(self) -> int:
    """Floating-point operations that a LoRA step needs: 4 * N * tokens.

    Each token is multiplied by N weights of the base. The forward pass takes a
    multiplication and an addition for each weight. The backward pass takes as
    many, for the gradient of the activations. The base is frozen, so there is
    no gradient of the weights. The number leaves out attention scores,
    adapters, repeated work of rematerialisation, and the second gradient of
    SAM.
    """
    return 4 * self.multiplied * self.tokens


def build(
  name: str,
  batch_size: int | None = None,
  length: int | None = None,
  remat: str = "dots",
  scan: bool = True,
) -> Workload:
  """Returns the workload of that name.

  Args:
    name: 'minilm' or 'minilm-256', which are pretrained and float32, with
      batches of 32 or 256 rows of 32 tokens; or one of `DECODERS`, which have
      random weights.
    batch_size: rows of a batch; None: the number of the workload.
    length: tokens in a row; None: the number of the workload.
    remat: the option of decoders; see `decoder.Decoder`.
    scan: the option of decoders; see `decoder.Decoder`.
  """
  if name in _BERTS:
    return _bert(batch_size or _BERTS[name], length or 32)
  config = DECODERS[name]
  model = decoder.Decoder(
    config, jnp.bfloat16, jnp.bfloat16, remat=remat, scan=scan
  )
  # Drawn on the device, because the host may have too little memory for the
  # largest decoder.
  variables = jax.jit(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  )
  return of_decoder(model, variables, batch_size or 8, length or 1024)


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options that `from_options` reads."""
  parser.add_argument("--workload", choices=NAMES, default=NAMES[0])
  parser.add_argument("--batch-size", type=int)
  parser.add_argument("--length", type=int)
  parser.add_argument(
    "--remat", choices=remat_lib.CHOICES, default="dots", help="of decoders"
  )
  parser.add_argument(
    "--unrolled",
    action="store_true",
    help="layers of decoders written out, and not in a scan",
  )


def from_options(options: argparse.Namespace) -> Workload:
  """Returns the workload for a command line."""
  return build(
    options.workload,
    options.batch_size,
    options.length,
    options.remat,
    not options.unrolled,
  )


def of_decoder(
  model: decoder.Decoder,
  variables: Callable[[], Any],
  batch_size: int,
  length: int,
) -> Workload:
  """Returns a workload of next-token prediction on rows of random tokens.

  Args:
    model: the decoder.
    variables: makes the variables of the decoder.
    batch_size: rows of a batch.
    length: tokens in a row.
  """
  return Workload(
    model=model,
    variables=variables,
    objective=NEXT_TOKEN,
    batch=next_tokens(model.config.vocab_size, batch_size, length),
    dtype=model.dtype or jnp.float32,
    multiplied=_multiplied(jax.eval_shape(variables), model.config.tied),
  )


def next_tokens(
  vocab_size: int, batch_size: int, length: int
) -> dict[str, np.ndarray]:
  """Returns rows of random tokens, which all have targets.

  Each row is one segment.
  """
  rng = np.random.default_rng(0)
  rows = rng.integers(0, vocab_size, (batch_size, length + 1), np.int32)
  shape = (batch_size, length)
  return {
    "tokens": rows[:, :-1],
    "targets": rows[:, 1:],
    "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
    "lengths": np.full((batch_size, 1), length, np.int32),
    "weights": np.ones(shape, np.float32),
  }


def labelled(batch_size: int, length: int) -> dict[str, np.ndarray]:
  """Returns full rows of random tokens of BERT, with labels 0 or 1."""
  rng = np.random.default_rng(0)
  shape = (batch_size, length)
  return {
    "tokens": rng.integers(1000, 20000, shape, np.int32),
    "mask": np.ones(shape, np.int32),
    "token_types": np.zeros(shape, np.int32),
    "labels": rng.integers(0, 2, batch_size, np.int32),
  }


def _bert(batch_size: int, length: int) -> Workload:
  found = load.open_pretrained("minilm")
  model = found.classifier(2)
  variables = found.variables(model, 0)
  return Workload(
    model=model,
    variables=lambda: variables,
    objective=CLASSIFICATION,
    batch=labelled(batch_size, length),
    dtype=jnp.float32,
    multiplied=_multiplied(variables, tied=False),
  )


def _multiplied(variables: Any, tied: bool) -> int:
  # A look-up of an embedding multiplies nothing. If the embedding is tied, its
  # transpose is the head, which multiplies.
  leaves = ("kernel", "embedding") if tied else ("kernel",)
  params = jax.tree_util.tree_leaves_with_path(variables["params"])
  return sum(
    math.prod(leaf.shape) for path, leaf in params if path[-1].key in leaves
  )
