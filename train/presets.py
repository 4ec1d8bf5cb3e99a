"""Presets: configurations by name, the paper's experiments among them."""

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

# What all of the paper's runs share (arXiv 2508.19564, appendix R) is written
# out, though most is a default: defaults may change.
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
# Rho of Bi-LoRA, and of LoRA-SAM.
_GLUE_RHO = (0.05, 0.01)
_SUPER_GLUE_RHO = (0.1, 0.05)

# The base, in bfloat16, is run a few rows at a time. A batch is of so many
# conversations, so that none are packed.
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
  accumulate=8,  # of 4 rows each
  epochs=2,
  max_length=1024,
)
_ALPACA = replace(
  _DECODER,
  data="alpaca-cleaned.jsonl",
  batch_size=128,
  accumulate=32,  # of 4 rows each
  epochs=3,
  max_length=256,
)


def _with_lora(
  name: str, config: Config, rho: tuple[float, float]
) -> dict[str, Config]:
  """Bi-LoRA, and the two that the paper compares it with."""
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
  # GLUE has the same RTE, and TFDS reads it.
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
    # As the paper's Table A11 has it; its text says 5e-4.
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

Those of the paper's settings (arXiv 2508.19564, appendix R) are Bi-LoRA's, and
with `-lora` or `-lora-sam` behind their names what it is compared with. The
instructions they learn from are files of the published data sets' rows, one a
line, that `--data` may name elsewhere: MetaMathQA, Code-Feedback (the filtered
instructions), WizardLM and the cleaned Alpaca.
"""


def get(name: str) -> Config:
  """The configuration of that name.

  Raises:
    UsageError: if there is none; with the names that are nearest.
  """
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, n=3) or list(_OWN)
    raise UsageError(f"there is no preset {name!r}; perhaps {', '.join(near)}?")
  return PRESETS[name]


def listed() -> str:
  """The names, in a sentence's part, for `--help`."""
  ours = [name for name in _PAPER if PRESETS[name].method.name == "bilora"]
  return (
    f"{', '.join(_OWN)}; or, for the paper's experiments, one of these names, "
    f"alone or followed by -lora or -lora-sam: {', '.join(ours)}"
  )
