"""Options of `compile`."""

import dataclasses
from typing import Literal

from ..options import option


@dataclasses.dataclass(frozen=True)
class Compile:
  """Compiles the training step of a language model, and tells what it takes.

  Nothing is run, and no weights are needed. With --topology no devices are
  needed either: the compilers for TPUs (`pip install 'jax[tpu]'`) and GPUs
  (`pip install 'jax[cuda12]'`) work without them.
  """

  model: str = "llama3.1-8b"
  """Name of a size (llama3.1-8b, qwen2.5-14b, ...), or a folder with the
  config.json of a decoder, such as a Llama or a Qwen 2."""
  topology: str = ""
  """TPUs or GPUs to compile for, such as v5e:4x4 or h100:8. Empty means the
  devices of this machine."""
  mesh: str = ""
  """Number of devices along data, fsdp, context and tensor, such as fsdp=16."""
  method: str = "lora,bilora"
  """Methods to compile, separated by commas, named as in a run. Each is
  compared with the first."""

  batch_size: int = option(128, least=1, below=2**20)
  """Number of rows in a step, over all devices."""
  max_length: int = option(256, least=3, below=2**21)
  """Number of tokens in a row."""
  accumulate: int = option(1, least=1)
  """Number of parts that a batch is divided into. The parts run one after
  another."""
  rank: int = option(8, least=1, below=2**16)
  """r1, the rank of the primary adapter."""
  auxiliary_rank: int = option(8, least=1, below=2**16)
  """r2, the rank of the auxiliary adapter (for bilora)."""
  targets: str = ".*_proj"
  """Regular expression for the paths of the modules that get adapters."""
  dtype: Literal["float32", "bfloat16"] = "bfloat16"
  """Type that the model computes in."""
  base_dtype: Literal["float32", "bfloat16", "nf4", "int8", "fp8"] = "bfloat16"
  """Type that the frozen weights are stored in, as in a run."""
  remat: Literal["none", "dots", "base", "full", "offload"] = "full"
  """What the backward pass of a layer computes again. none: nothing. dots: all
  but products with weights. base: products with adapters as well. full: all.
  offload: the same as base, and what base keeps is moved to the host's
  memory."""
  scan_layers: bool = True
  """Compile one layer in place of all layers."""

  json: str = ""
  """File to which the figures are also written. Empty means none."""
