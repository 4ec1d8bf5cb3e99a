"""The options of adapters and of optimisation, which methods share."""

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
  default is every linear layer. A new head is trained whole, without an
  adapter."""
  dropout: float = option(0.0, least=0, below=0.99)
  """Dropout rate at the input of the adapters."""
  path: str = option("", flag="adapter")
  """Folder of Hugging Face PEFT with a LoRA to start from. The run takes over
  its ranks, alphas, targets, rsLoRA and DoRA, and goes on to train the modules
  that it trained whole. Empty means new adapters."""
  new_head: bool = option(False)
  """Leave out the head in the folder of --adapter, and train a new head."""
  start: Literal[
    "uniform", "gaussian", "orthogonal", "pissa", "olora", "lora_ga"
  ] = option("uniform")
  """Initialisation of the primary adapter. uniform: LoRA's own random draw.
  gaussian and orthogonal: two other random draws. pissa: the principal
  components of the weights. olora: the first columns of the weights. lora_ga:
  the gradient of the first batch. pissa, olora and lora_ga take that part out
  of the base during the run. The adapters that the run keeps fit the original
  base, and have twice the rank. These three need one device and a base that is
  not quantised."""
  dora: bool = option(False)
  """Also train the norms of the columns of the adapted weights (for methods
  that perturb the factors or nothing)."""


@dataclasses.dataclass(frozen=True)
class OptimisationOptions:
  """The optimiser, the batches and the seed."""

  learning_rate: float = option(5e-4, least=0, below=1e6)
  """Learning rate of AdamW at the peak of its cosine schedule, for both
  adapters."""
  epochs: int = option(3, least=1, below=10**6)
  """Number of passes over the training rows."""
  batch_size: int = option(32, least=1, below=2**20)
  """Number of examples in a step, over all processes."""
  seed: int = option(0, least=0, below=2**63)
  """Seed of the adapters, the head, the drawn rows and their order."""
  warmup_ratio: float = option(0.03, least=0, below=1)
  """Share of the steps in which the learning rate rises from 0."""
  weight_decay: float = option(0.0, least=0, below=1e6)
  """AdamW's decoupled weight decay."""
  label_smoothing: float = option(0.0, least=0, below=1)
  """Share of each training label that is spread over all classes."""
  max_grad_norm: float = option(0.0, least=0)
  """Clip the gradient of the parameters that descend the loss to this global
  norm. 0 means no clipping."""
  accumulate: int = option(1, least=1)
  """Number of parts that a batch is divided into. The parts run one after
  another, to save memory, and the step is the same as that of the whole
  batch."""
  on_nonfinite: Literal["skip", "stop"] = option("skip")
  """What to do with a step whose loss or gradient is not finite: skip the step,
  or stop the run. Ten such steps in a row always stop the run."""
