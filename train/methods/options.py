"""Options of adapters and of optimisation, that methods share."""

import dataclasses
from typing import Literal

from ..options import option


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
  """The adapters (of the methods that train any)."""

  rank: int = option(8, least=1, below=2**16)
  """r1, the rank of the primary adapter."""
  alpha: float = option(16.0, above=0, below=1e6)
  """Adapters are scaled by alpha / rank."""
  targets: str = option(".*")
  """Regular expression for the paths of the modules that get adapters. The
  default is every linear layer; a new head is trained as it is."""
  dropout: float = option(0.0, least=0, below=0.99)
  """Dropout rate at the input of the adapters."""
  path: str = option("", flag="adapter")
  """A folder of Hugging Face PEFT's with a LoRA to start from; its ranks,
  alphas, targets, rsLoRA and DoRA are its own, and what it has trained whole
  goes on with it."""
  new_head: bool = option(False)
  """Leave out the head that --adapter brings, and train a new one."""
  start: Literal[
    "uniform", "gaussian", "orthogonal", "pissa", "olora", "lora_ga"
  ] = option("uniform")
  """The initialisation of the primary adapter: LoRA's own draw, two other
  draws, the weights' principal parts (pissa), their first columns (olora), or
  the first batch's gradient (lora_ga). The last three take that part out of the
  base, in which the run trains. What the run keeps is for the base as it came,
  and of twice the rank. They need one device and a base of floats."""
  dora: bool = option(False)
  """Also train the norms of the adapted weights' columns (methods whose
  perturbation, if any, is of the factors)."""


@dataclasses.dataclass(frozen=True)
class OptimisationOptions:
  """The optimiser, the batches and the seed."""

  learning_rate: float = option(5e-4, least=0, below=1e6)
  """Peak of the cosine schedule, in AdamW's units; for both adapters."""
  epochs: int = option(3, least=1, below=10**6)
  """Passes over the training rows."""
  batch_size: int = option(32, least=1, below=2**20)
  """Examples in a step, over all processes."""
  seed: int = option(0, least=0, below=2**63)
  """Of the adapters, the head, the drawn rows and their order."""
  warmup_ratio: float = option(0.03, least=0, below=1)
  """Share of the steps in which the learning rate rises from 0."""
  weight_decay: float = option(0.0, least=0, below=1e6)
  """AdamW's decoupled weight decay."""
  label_smoothing: float = option(0.0, least=0, below=1)
  """Share of each training label that is spread over all classes."""
  max_grad_norm: float = option(0.0, least=0)
  """Clips the gradient of what descends to this global norm; 0: no clip."""
  accumulate: int = option(1, least=1)
  """Parts that a batch is run in, one after another, to save memory; the step
  is that of the whole batch."""
  on_nonfinite: Literal["skip", "stop"] = option("skip")
  """What to do about a step whose loss or gradient is not finite; ten in a row
  end the run in any case."""
