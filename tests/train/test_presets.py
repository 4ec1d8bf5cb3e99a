"""Presets: the paper's settings, and names."""

import pytest

from train import presets
from train.errors import UsageError
from train.run import config as config_lib

# PAPER, appendix R: preset, learning rate, batch, micro batch, epochs, longest
# example, rho of Bi-LoRA and of LoRA-SAM.
_T5 = (5e-4, 32, 32)
_LLAMA2 = (5e-4, 32, 4, 2, 1024, 0.05, 0.01)
SETTINGS = {
  **{
    f"t5-base-glue-{task}": (*_T5, epochs, 256, 0.05, 0.01)
    for task, epochs in {
      "mnli": 3,
      "sst2": 3,
      "qnli": 3,
      "cola": 10,
      "mrpc": 10,
    }.items()
  },
  **{
    f"t5-base-super-glue-{task}": (*_T5, epochs, 256, 0.1, 0.05)
    for task, epochs in {
      "boolq": 10,
      "rte": 10,
      "wic": 10,
      "cb": 50,
      "copa": 50,
    }.items()
  },
  "llama2-7b-metamathqa": _LLAMA2,
  "llama2-7b-code-feedback": _LLAMA2,
  "llama2-7b-wizardlm": _LLAMA2,
  "llama3.1-8b-alpaca": (3e-4, 128, 4, 3, 256, 0.05, 0.01),
  "qwen2.5-14b-alpaca": (5e-5, 128, 4, 3, 256, 0.1, 0.05),
}


def test_every_preset_passes_the_check():
  for name in presets.PRESETS:
    config_lib.check(presets.get(name))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_the_paper(name):
  ours = presets.get(name)
  rate, batch, micro, epochs, length, rho, sam = SETTINGS[name]
  for config in (ours, presets.get(f"{name}-lora")):
    lora, steps = config.adapter, config.optimisation
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 16.0, 0.0)
    assert (steps.learning_rate, steps.weight_decay) == (rate, 0.0)
    assert steps.warmup_ratio == 0.03
    assert (steps.batch_size, steps.epochs) == (batch, epochs)
    assert steps.batch_size // steps.accumulate == micro
    assert (config.data.max_length, lora.targets) == (length, ".*")
  assert ours.method.name == "bilora"
  assert (ours.method.options.auxiliary_rank, ours.method.options.rho) == (
    *(8, rho),
  )
  assert presets.get(f"{name}-lora").method.name == "lora"
  lora_sam = presets.get(f"{name}-lora-sam")
  assert lora_sam.method.name == "lora_sam"
  assert lora_sam.method.options.rho == sam
  # Nothing else is another.
  changed = config_lib.differences(ours, lora_sam)
  own = set(config_lib.options.fields(ours.method.spec.options))
  assert set(changed) <= {"method", *own}


def test_every_preset_of_the_paper_is_looked_at_here():
  named = {name for name in presets.PRESETS if "snippets" not in name}
  endings = ("", "-lora", "-lora-sam")
  assert named == {f"{name}{end}" for name in SETTINGS for end in endings}


def test_an_unknown_preset_is_answered_with_the_nearest():
  with pytest.raises(UsageError, match=r"'snippet-lora'.*snippets-lora"):
    presets.get("snippet-lora")
