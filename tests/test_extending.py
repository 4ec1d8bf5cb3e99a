"""The four files of docs/extending.md, as they stand, in one run."""

import json
import pathlib
import re

import numpy as np
import pytest
from safetensors import numpy as st_numpy
import tokenizers
from tokenizers import models, pre_tokenizers

from train import __main__ as program
from train.data import registry as tasks
from train.methods import spec
from train.models import registry as families
from train.run.loggers import registry as loggers

_PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
_NAMES = ("method", "task", "logger", "family")


@pytest.fixture(scope="module", autouse=True)
def registries():
  """Other tests do not see what is registered here."""
  tasks.names()  # has those of the program registered
  known = (
    *(families._families, tasks._BY_NAME),
    *(spec._ADDED, loggers._FACTORIES),
  )
  before = [dict(one) for one in known]
  yield
  for one, old in zip(known, before):
    one.clear()
    one.update(old)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """The files, and a model of the family."""
  found = tmp_path_factory.mktemp("plugins")
  blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
  for name, text in zip(_NAMES, blocks, strict=True):
    (found / f"{name}.py").write_text(text)
  model = found / "mean"
  model.mkdir()
  ids = {"[PAD]": 0, "0": 1, "1": 2}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, "[PAD]"))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(model / "tokenizer.json"))
  sizes = {"model_type": "mean", "vocab_size": 3, "hidden_size": 16}
  (model / "config.json").write_text(json.dumps(sizes))
  draws = np.random.default_rng(0)
  shapes = {
    "word.weight": (3, 16),
    "inner.weight": (16, 16),
    "inner.bias": (16,),
  }
  st_numpy.save_file(
    {name: draws.normal(size=x).astype("f") for name, x in shapes.items()},
    model / "model.safetensors",
  )
  return found


def test_a_model_a_task_a_method_and_a_logger_of_a_file_each_run(
  folder, tmp_path, capsys
):
  plugins = ",".join(str(folder / f"{name}.py") for name in _NAMES)
  run = tmp_path / "run"
  options = [
    *("--plugins", plugins, "--model", str(folder / "mean")),
    *("--task", "parity", "--method", "lora_lion", "--loggers", "csv"),
    *("--lion-b1", "0.8", "--rank", "2", "--batch-size", "16"),
    *("--learning-rate", "0.01", "--epochs", "2", "--log-every", "2"),
    *("--run-dir", str(run), "--no-compilation-cache", "--max-length", "8"),
  ]
  assert program.main(options) == 0
  kept = json.loads((run / "config.json").read_text())
  assert kept["method"] == {"method": "lora_lion", "lion_b1": 0.8}
  assert json.loads((run / "results.json").read_text())["steps"] == 8
  lines = (run / "metrics.csv").read_text().splitlines()
  assert {line.split(",")[1] for line in lines} >= {"loss", "validation_loss"}
  # What opens the run again imports the files by its configuration.
  capsys.readouterr()
  predict = ["predict", "--run", str(run), "--text", "1 0 1 1 0 0 0"]
  assert program.main(predict) == 0
  assert re.search("even|odd", capsys.readouterr().out)


def test_options_of_a_plugin_s_method_are_its_own(folder, capsys):
  options = ["--plugins", str(folder / "method.py"), "--method", "lora"]
  assert program.main([*options, "--lion-b1", "0.8"]) == 2
  assert "--lion-b1 is an option of --method lora_lion" in (
    capsys.readouterr().err
  )
