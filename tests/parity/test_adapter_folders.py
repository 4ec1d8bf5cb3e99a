"""Folders by PEFT over its options, loaded, and written for PEFT again.

Run by `make test-parity`.
"""

import adapter_folders
import make_adapter_folders as maker
import numpy as np
import peft as torch_peft
import pytest

from bilora_jax import peft

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", maker.CASES)
def test_a_folder_computes_what_peft_does_or_is_refused(name, tmp_path):
  maker.write(name, tmp_path)
  facts = maker.facts(name)
  if "bert" not in facts["base"]:
    adapter_folders.check(tmp_path, facts, scan=True)
  loaded = adapter_folders.check(tmp_path, facts, scan=False)
  if loaded is None:
    return
  out = tmp_path / "out"
  peft.save(out, loaded.adapted, loaded.adapters, loaded.kind.names)
  case = maker.CASES[name]
  # What is written is of the whole model, whatever was read.
  plain = maker.Case(case.base, {}, head=facts["head"])
  model = torch_peft.PeftModel.from_pretrained(maker.base(plain), out)
  with np.load(tmp_path / "reference.npz") as file:
    tokens, wanted = file["tokens"], file["logits"]
  np.testing.assert_allclose(
    maker.logits(plain, model.eval(), tokens),
    wanted,
    rtol=0,
    atol=adapter_folders.TOLERANCE,
  )
