"""The README's code runs as it stands, and its commands exist."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

from flax import linen as nn
from flax import nnx
import jax
import numpy as np
import optax
import pytest
import tyro

from train import config as command_line
from train.finished import export, generate, predict
from train.planning import compile as compile_lib
from train.run import config as config_lib
from train.study import main as study

_ROOT = pathlib.Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()


@pytest.mark.parametrize("host", ["linen", "nnx"])
def test_the_twenty_lines_run_and_evaluate_what_they_merge(host):
  (code,) = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)
  x = jax.random.normal(jax.random.key(0), (6, 4))
  if host == "linen":
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])
    variables, apply = model.init(jax.random.key(1), x), model.apply
  else:
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(4, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 3, rngs=rngs)
    model = nnx.Sequential(*layers)
    graphdef, variables = nnx.split(model)

    def apply(variables, x):
      return nnx.merge(graphdef, variables)(x)

  names = {"model": model, "x": x, "variables": variables}
  # One step between the definitions and the evaluation.
  before, after = code.split(
    "logits = adapted.apply(variables, without_auxiliary"
  )
  exec(before, names)
  batch = {"x": x, "y": np.arange(6) % 3}
  names["adapters"], names["opt_state"], loss = names["train_step"](
    variables, names["adapters"], names["opt_state"], batch
  )
  assert np.isfinite(loss)
  exec("logits = adapted.apply(variables, without_auxiliary" + after, names)
  assert np.abs(names["logits"] - apply(variables, x)).max() > 0
  np.testing.assert_allclose(
    apply(names["variables"], x), names["logits"], atol=1e-5
  )


@pytest.mark.slow
def test_the_twenty_lines_are_clean_under_pyright(tmp_path):
  pytest.importorskip("pyright")
  (code,) = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)
  code = f"""
from flax import linen as nn
import jax.numpy as jnp
model, x, batch = nn.Dense(3), jnp.ones((2, 4)), {{"x": jnp.ones((2, 4))}}
variables = model.init(jax.random.key(0), x)
{code.replace("@jax.jit", "")}
for _ in range(3):
  adapters, opt_state, loss = train_step(variables, adapters, opt_state, batch)
print(adapted.merge(variables, without_auxiliary(adapters)))
"""
  (tmp_path / "readme.py").write_text("import jax\n" + code)
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


_LINES = _README.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize(
  "command",
  [x.strip() for x in _LINES if x.startswith("    python -m train")],
)
def test_every_command_has_options_that_exist(command):
  _, _, _, *arguments = shlex.split(command, comments=True)
  own = {
    "compile": compile_lib.Options,
    "generate": generate.Options,
    "predict": predict.Options,
    "export": export.Options,
    "study": study.Options,
  }
  if arguments[0] in own:
    tyro.cli(own[arguments[0]], args=arguments[1:])
  else:
    config_lib.check(command_line.parse(arguments))
