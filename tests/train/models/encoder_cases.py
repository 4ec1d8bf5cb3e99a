"""Small encoders whose hidden states PyTorch computed, for tests of ours."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.models import load
from train.models.family import Pretrained
from train.models.io import tensors

DATA = pathlib.Path(__file__).with_name("data")
NAMES = (
  *("roberta", "xlm_roberta", "distilbert", "electra"),
  *("deberta", "deberta_v2", "deberta_v3"),
  "modernbert",
)
# Without their tokenizer.json, these need a package that CI has not.
SENTENCE_PIECE = {"xlm_roberta", "deberta_v2", "deberta_v3"}
# Of these the program makes runs: one of each way to compute.
RUN = ("electra", "deberta_v3", "modernbert")
LABELS = 3


class Case(NamedTuple):
  """A folder that transformers wrote, and what it computes with it.

  Attributes:
    pretrained: the folder, opened.
    model: with the folder's own head.
    variables: of `model`.
    inputs: tokens, mask and segments, int (B, L).
    hidden: states of the last layer, (B, L, D).
    logits: of every token, (B, L, 3), or of every row, (B, 3).
  """

  pretrained: Pretrained
  model: Any
  variables: Any
  inputs: tuple[np.ndarray, ...]
  hidden: np.ndarray
  logits: np.ndarray

  def apply(self, *inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Our hidden states and logits, by one compiled program."""
    hidden, logits = _compiled(self.model)(self.variables, *inputs)
    return np.asarray(hidden), np.asarray(logits)


@functools.cache
def _compiled(model: Any) -> Any:
  def both(model, *inputs):
    return model.encoder(*inputs), model(*inputs)

  return jax.jit(functools.partial(model.apply, method=both))


@functools.cache
def load_case(name: str) -> Case:
  pretrained = load.open_pretrained(str(DATA / name))
  model = pretrained.classifier(LABELS)
  variables = pretrained.variables(model)
  stored = tensors.read_all(tensors.open_safetensors(DATA / name))
  variables["params"]["head"] = {
    "kernel": jnp.asarray(stored["classifier.weight"].T),
    "bias": jnp.asarray(stored["classifier.bias"]),
  }
  with np.load(DATA / name / "reference.npz", allow_pickle=False) as file:
    inputs = tuple(file[key] for key in ("tokens", "mask", "token_types"))
    return Case(
      pretrained, model, variables, inputs, file["hidden"], file["logits"]
    )
