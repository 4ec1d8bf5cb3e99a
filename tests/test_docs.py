"""The guides' code runs as it stands, and their links lead somewhere."""

import json
import pathlib
import re

import jax
import numpy as np
import optax
import pytest

from train.models import overview, registry

_DOCS = pathlib.Path(__file__).parents[1] / "docs"
_PAGES = sorted(_DOCS.rglob("*.md"))


def test_both_hosts_of_the_guide_train_a_primary_and_keep_the_ball():
  text = (_DOCS / "trainer.md").read_text()
  linen, on_time, host = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  names: dict = {}
  exec(linen, names)
  state = names["state"]
  assert state.step == 3 and np.isfinite(names["loss"])
  first = jax.tree.leaves(state.params["primary"])[0]
  assert first.shape == (4, 4)
  assert names["logits"].shape == (8, 3)
  exec(on_time, names)
  state = names["on_time"]
  assert state.step == 4
  # After a second visit the auxiliary is made of sketches, and next to nothing.
  assert optax.tree.get(state.opt_state, "clip_factor") == 1
  exec(host, names)
  assert [x.shape for x in jax.tree.leaves(names["lora"])] == [
    *((4, 4), (4, 16)),
    *((16, 4), (4, 3)),
  ]
  whole = names["nnx"].state(names["network"], names["nnx"].LoRAParam)
  auxiliary = names["layout"].split(whole, 4)["auxiliary"]
  found = np.sqrt(sum(np.sum(x.squared_norm()) for x in auxiliary.values()))
  # Adam's three steps of 5e-4 are within the ball, and not at its middle.
  assert 0 < found <= 0.05 * (1 + 1e-6)
  clip = optax.tree.get(names["optimizer"].opt_state, "clip_factor")
  assert np.isfinite(clip[...])


def _run(page, folder, monkeypatch):
  """The names that a page's code leaves, run from top to bottom."""
  monkeypatch.chdir(folder)
  text = (_DOCS / f"{page}.md").read_text()
  names: dict = {"__name__": "__main__"}
  for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
    exec(block, names)
  return names


def test_what_the_guide_saves_merges_and_shares_is_one_model(
  tmp_path, monkeypatch
):
  names = _run("sharing", tmp_path, monkeypatch)
  np.testing.assert_allclose(names["same"], names["logits"], atol=1e-5)
  from_peft = names["continued"].apply(
    names["variables"], names["start"], names["x"]
  )
  np.testing.assert_allclose(from_peft, names["logits"], atol=1e-5)
  plain = names["model"].apply(names["variables"], names["x"])
  assert np.max(np.abs(plain - names["logits"])) > 1e-3
  assert (tmp_path / "run" / "peft" / "adapter_config.json").exists()


def test_the_guide_of_nnx_drops_out_and_keeps_running_means(
  tmp_path, monkeypatch
):
  names = _run("nnx", tmp_path, monkeypatch)
  assert names["logits"].shape == (8, 3) and np.isfinite(names["loss"])
  means = [names[when]["norm"]["mean"][...] for when in ("before", "variables")]
  assert np.max(np.abs(means[0] - means[1])) > 1e-3


def test_the_guide_of_adapters_keeps_a_mixture_in_the_ball(
  tmp_path, monkeypatch
):
  names = _run("adapters", tmp_path, monkeypatch)
  kinds = [
    type(x["kernel"]).__name__ for x in names["params"]["primary"].values()
  ]
  assert kinds == ["LoHa", "LoKr", "Factors"]
  np.testing.assert_allclose(
    names["model"].apply(names["merged"], names["x"]),
    names["logits"],
    atol=1e-5,
  )
  auxiliary = names["shifts"]["auxiliary"]["bias"]
  np.testing.assert_allclose(auxiliary.squared_norm(), 0.05**2, rtol=1e-5)


@pytest.mark.parametrize("page", _PAGES, ids=lambda x: x.stem)
def test_links_to_files_lead_to_one(page):
  for link in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text()):
    assert (page.parent / link).exists(), link


def test_every_page_is_in_a_table_of_contents():
  listed = set(
    re.findall(r"^([\w/]+)$", (_DOCS / "index.md").read_text(), re.MULTILINE)
  )
  names = {str(x.relative_to(_DOCS).with_suffix("")) for x in _PAGES}
  assert names - {"index"} <= listed


def test_the_table_of_models_is_that_of_the_registry():
  assert overview.table() in (_DOCS / "models.md").read_text()


def test_every_kind_of_model_is_compared_with_pytorch():
  data = pathlib.Path(__file__).parent / "train" / "models" / "data"
  compared = {
    json.loads(path.read_text())["model_type"]
    for path in data.glob("*/config.json")
    if path.with_name("reference.npz").exists()
  }
  # The image tower alone, and within a model of texts too, are one family.
  compared |= {x.removesuffix("_vision_model") for x in compared}
  kinds = {kind for x in registry.OWN for kind in x.model_types}
  assert {x.removesuffix("_vision_model") for x in kinds} <= compared
