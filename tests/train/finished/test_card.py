"""The card of an export: its head, its numbers, lines that load it."""

import json
import re

import huggingface_hub
import pytest

from train import __main__ as program
from train.models.io import weights


def _exported(folder, out, *more):
  return program.main(
    ["export", "--run", str(folder), "--out", str(out), *map(str, more)]
  )


def _lines(card):
  """The Python of a card, which can be compiled."""
  (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
  compile(code, "README.md", "exec")
  return code


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_card_says_what_the_export_is_and_how_good(
  finished_by, tmp_path, tiny_model, method
):
  folder, out = finished_by(method), tmp_path / "mine"
  assert _exported(folder, out, "--base-model", "some/base") == 0
  card = (out / "README.md").read_text()
  head = huggingface_hub.metadata_load(out / "README.md")
  assert head["base_model"] == "some/base"
  whole = method == "full"
  assert head["library_name"] == ("transformers" if whole else "peft")
  assert method in head["tags"]
  test = json.loads((folder / "results.json").read_text())["test"]
  (result,) = head["model-index"][0]["results"]
  assert result["metrics"] == [{"type": "accuracy", "value": test["accuracy"]}]
  low, high = test["accuracy_95"]
  assert f"{test['accuracy']:.4f} (95%: {low:.4f} to {high:.4f})" in card
  assert "| learning_rate | 0.01 |" in card
  code = _lines(card)
  assert "AutoModelForTokenClassification" in code and "'mine'" in code
  assert ("PeftModel" in code) is not whole
  for path in (tmp_path, tiny_model, folder):
    assert str(path) not in card


def test_a_base_that_others_do_not_have_is_warned_of(
  finished_by, tmp_path, capsys
):
  assert _exported(finished_by("lora"), tmp_path / "out") == 0
  assert "give its name on the hub with --base-model" in capsys.readouterr().err
  config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
  said = "local model; give --base-model"
  assert config["base_model_name_or_path"] == said
  assert said in (tmp_path / "out" / "README.md").read_text()


def test_models_in_packages_have_their_names_on_the_hub(tmp_path, monkeypatch):
  name, note = weights.origin("minilm")
  assert (name, note) == ("sentence-transformers/all-MiniLM-L6-v2", "")
  name, note = weights.origin("smollm2")
  assert name == "HuggingFaceTB/SmolLM2-135M-Instruct" and "Q4_1" in note
  assert weights.origin("some/model") == ("some/model", "")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "some" / "model").mkdir(parents=True)
  for local in ("some/model", "./some/model", "/a/b", "package:x"):
    assert weights.origin(local) == ("", "")


@pytest.mark.parametrize("method", ["lora", "head"])
def test_only_an_export_is_replaced_and_only_if_asked(
  finished_by, tmp_path, capsys, method
):
  folder, out = finished_by(method), tmp_path / "out"
  base = ("--base-model", "some/base")
  out.mkdir()
  (out / "mine.txt").touch()
  assert _exported(folder, out, *base) == 2
  assert "a new or an empty folder" in capsys.readouterr().err
  assert _exported(folder, out, *base, "--overwrite") == 2
  assert "a folder that export wrote" in capsys.readouterr().err
  assert (out / "mine.txt").exists()
  (out / "mine.txt").unlink()
  assert _exported(folder, out, *base) == 0
  files = {path.name: path.read_bytes() for path in out.iterdir()}
  (out / "README.md").write_text("mine")
  assert _exported(folder, out, *base) == 2
  assert _exported(folder, out, *base, "--overwrite") == 0
  assert {path.name: path.read_bytes() for path in out.iterdir()} == files
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  # Not what is exported, either.
  assert _exported(folder, folder, *base, "--overwrite") == 2
  assert "contains the run" in capsys.readouterr().err
