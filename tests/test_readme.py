"""The README's code runs as it stands; its commands and the pages' exist."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import optax
import pytest
import tyro

from train import config as command_line
from train.finished.options import Export, Generate, Predict
from train.planning.options import Compile
from train.run import config as config_lib
from train.study import main as study

_ROOT = pathlib.Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()


def _blocks():
  """The twenty lines, and those that make an NNX model in their place."""
  return re.findall(r"```python\n(.*?)```", _README, re.DOTALL)


@pytest.mark.parametrize("host", ["linen", "nnx"])
def test_the_twenty_lines_run_alone_and_evaluate_what_they_merge(host):
  code, of_nnx = _blocks()
  if host == "nnx":
    # The lines that make the model, without the batch between them.
    code = re.sub(r"model = .*\n", "", code, count=1)
    code = code.replace(
      "variables = model.init(jax.random.key(1), x)\n", of_nnx
    )
  names = {}
  exec(code, names)
  assert names["loss"] < 0.5 * np.log(3)
  apply = names["model"].apply if host == "linen" else _call_nnx
  logits = apply(names["variables"], names["x"])
  np.testing.assert_allclose(logits, names["logits"], atol=1e-4)
  assert (np.argmax(logits, -1) == names["y"]).mean() > 0.9


def _call_nnx(variables, x):
  names = {}
  exec(_blocks()[1], names)
  graphdef = names["nnx"].graphdef(names["model"])
  return names["nnx"].merge(graphdef, variables)(x)


@pytest.mark.slow
def test_the_twenty_lines_are_clean_under_pyright(tmp_path):
  pytest.importorskip("pyright")
  code = _blocks()[0].replace("@jax.jit", "")
  (tmp_path / "readme.py").write_text(code)
  config = {"typeCheckingMode": "standard", "extraPaths": [str(_ROOT)]}
  (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
  command = ["pyright", "--pythonpath", sys.executable, "-p", str(tmp_path)]
  run = subprocess.run(
    [sys.executable, "-m", *command], capture_output=True, text=True
  )
  assert run.returncode == 0, run.stdout


def test_the_subpackages_come_with_the_package():
  names = re.findall(r"`bilora_jax\.([a-z]+)`", _README)
  assert {"baselines", "initializers", "variants", "sharpness"} <= set(names)
  # Not here, where other tests have imported them.
  program = "import bilora_jax; " + "; ".join(
    f"bilora_jax.{name}" for name in {*names, "peft"}
  )
  subprocess.run([sys.executable, "-c", program], check=True)


def test_what_it_says_bilora_composes_with_is_optaxs_and_keeps_the_ball():
  # tests/bilora_jax/test_ball.py and test_transform_wrappers.py try each.
  (said,) = re.findall(r"`bilora` composes:(.*?);", _README, re.DOTALL)
  names = {x.removeprefix("optax.") for x in re.findall(r"`([\w.]+)`", said)}
  assert names - {"bilora"} == {
    "chain",
    "MultiSteps",
    "apply_if_finite",
    "inject_hyperparams",
    "selective_transform",
  }
  assert all(hasattr(optax, name) for name in names - {"bilora"})


def test_every_make_target_and_file_that_it_names_exists():
  makefile = (_ROOT / "Makefile").read_text()
  targets = set(re.findall(r"(?:`|^    )make ([a-z]+)", _README, re.MULTILINE))
  assert {"run", "test"} <= targets
  for target in targets:
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
  for path in re.findall(r"\]\(([^)#:]+)\)", _README):
    assert (_ROOT / path).exists(), path


_PAGES = [_README, *(x.read_text() for x in (_ROOT / "docs").glob("*.md"))]
_LINES = [
  line for page in _PAGES for line in page.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize(
  "command",
  [
    *dict.fromkeys(
      x.strip()
      for x in _LINES
      # tests/test_extending.py runs those with files of a reader's own.
      if x.startswith("    python -m train") and "--plugins" not in x
    )
  ],
)
def test_every_command_has_options_that_exist(command):
  _, _, _, *arguments = shlex.split(command, comments=True)
  own = {
    "compile": Compile,
    "generate": Generate,
    "predict": Predict,
    "export": Export,
    "study": study.Options,
  }
  if arguments[0] in own:
    tyro.cli(own[arguments[0]], args=arguments[1:])
  else:
    config_lib.check(command_line.parse(arguments))
