"""Presets: named configurations, also for the paper's experiments."""

import difflib

from .errors import UsageError
from .run.config import Config, replace

_SNIPPETS = replace(Config(), train_rows=2000, group_by_length=10)
_SMOLLM2 = replace(
  Config(),
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
_OWN = {
  "snippets": _SNIPPETS,
  "snippets-lora": replace(_SNIPPETS, method="lora"),
  "snippets-full": replace(_SNIPPETS, method="full", learning_rate=5e-5),
  "snippets-smollm2": _SMOLLM2,
  "snippets-smollm2-lora": replace(_SMOLLM2, method="lora"),
}

# The options that all of the paper's runs share (arXiv 2508.19564, appendix R).
# Most are defaults, but they are written out because defaults may change.
_SHARED = replace(
  Config(),
  method="bilora",
  rank=8,
  auxiliary_rank=8,
  alpha=16.0,
  dropout=0.0,
  learning_rate=5e-4,
  weight_decay=0.0,
  warmup_ratio=0.03,
  batch_size=32,
  baseline=False,
)
_T5 = replace(_SHARED, model="google-t5/t5-base", max_length=256)
# The rho of Bi-LoRA, and the rho of LoRA-SAM.
_GLUE_RHO = (0.05, 0.01)
_SUPER_GLUE_RHO = (0.1, 0.05)

# The base is bfloat16, and a step runs a few rows at a time, to save memory. A
# batch of the paper is a number of conversations, so none are packed.
_DECODER = replace(
  _SHARED,
  task="instructions",
  pack=False,
  dtype="bfloat16",
  base_dtype="bfloat16",
  remat="full",
  scan_layers=True,
)
_LLAMA2 = replace(
  _DECODER,
  model="meta-llama/Llama-2-7b-hf",
  accumulate=8,  # parts of 4 rows
  epochs=2,
  max_length=1024,
)
_ALPACA = replace(
  _DECODER,
  data="alpaca-cleaned.jsonl",
  batch_size=128,
  accumulate=32,  # parts of 4 rows
  epochs=3,
  max_length=256,
)


def _with_lora(
  name: str, config: Config, rho: tuple[float, float]
) -> dict[str, Config]:
  """Returns presets of Bi-LoRA, LoRA and LoRA-SAM, which the paper compares."""
  ours, sam = rho
  return {
    name: replace(config, rho=ours),
    f"{name}-lora": replace(config, method="lora"),
    f"{name}-lora-sam": replace(config, method="lora_sam", rho=sam),
  }


def _t5(
  suite: str, task: str, epochs: int, rho: tuple[float, float]
) -> dict[str, Config]:
  config = replace(_T5, task=task, epochs=epochs)
  return _with_lora(f"t5-base-{suite}-{task.split('/')[1]}", config, rho)


_PAPER: dict[str, Config] = {
  **_t5("glue", "glue/mnli", 3, _GLUE_RHO),
  **_t5("glue", "glue/sst2", 3, _GLUE_RHO),
  **_t5("glue", "glue/qnli", 3, _GLUE_RHO),
  **_t5("glue", "glue/cola", 10, _GLUE_RHO),
  **_t5("glue", "glue/mrpc", 10, _GLUE_RHO),
  **_t5("super-glue", "super_glue/boolq", 10, _SUPER_GLUE_RHO),
  # The RTE of GLUE is the same, and TFDS reads it.
  **_t5("super-glue", "glue/rte", 10, _SUPER_GLUE_RHO),
  **_t5("super-glue", "super_glue/wic", 10, _SUPER_GLUE_RHO),
  **_t5("super-glue", "super_glue/cb", 50, _SUPER_GLUE_RHO),
  **_t5("super-glue", "super_glue/copa", 50, _SUPER_GLUE_RHO),
  **_with_lora(
    "llama2-7b-metamathqa",
    replace(_LLAMA2, data="metamathqa.jsonl", train_rows=100_000),
    (0.05, 0.01),
  ),
  **_with_lora(
    "llama2-7b-code-feedback",
    replace(_LLAMA2, data="code-feedback.jsonl", train_rows=100_000),
    (0.05, 0.01),
  ),
  **_with_lora(
    "llama2-7b-wizardlm",
    replace(_LLAMA2, data="wizardlm.jsonl"),
    (0.05, 0.01),
  ),
  **_with_lora(
    "llama3.1-8b-alpaca",
    # The paper's Table A11 says 3e-4; its text says 5e-4.
    replace(_ALPACA, model="meta-llama/Llama-3.1-8B", learning_rate=3e-4),
    (0.05, 0.01),
  ),
  **_with_lora(
    "qwen2.5-14b-alpaca",
    replace(_ALPACA, model="Qwen/Qwen2.5-14B", learning_rate=5e-5),
    (0.1, 0.05),
  ),
}

PRESETS: dict[str, Config] = {**_OWN, **_PAPER}
"""Configurations by name; the first is the default.

The presets of the paper's experiments (arXiv 2508.19564, appendix R) train with
Bi-LoRA. If `-lora` or `-lora-sam` follows the name, they train with LoRA or
LoRA-SAM, which the paper compares with Bi-LoRA.

The presets of Llama and Qwen learn from files with the rows of published data
sets, one row a line: MetaMathQA, Code-Feedback (the filtered instructions),
WizardLM and the cleaned Alpaca. `--data` can name another place of such a file.
"""


def get(name: str) -> Config:
  """Returns the configuration of a preset.

  Raises:
    UsageError: if there is no such preset; the message has the most similar
      names.
  """
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, n=3) or list(_OWN)
    raise UsageError(f"there is no preset {name!r}; perhaps {', '.join(near)}?")
  return PRESETS[name]


def listed() -> str:
  """Returns the names of all presets, as a part of a sentence of `--help`."""
  ours = [name for name in _PAPER if PRESETS[name].method.name == "bilora"]
  return (
    f"{', '.join(_OWN)}; or, for the paper's experiments, one of these names, "
    f"alone or followed by -lora or -lora-sam: {', '.join(ours)}"
  )
