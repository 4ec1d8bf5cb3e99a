"""The loop in the docstring of each baseline runs as it stands, and learns."""

import importlib
import pkgutil
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilora_jax import Factors, baselines

# Of these, one is the seam itself.
NAMES = sorted(
  module.name
  for module in pkgutil.iter_modules(baselines.__path__)
  if module.name != "_estimator"
)
_RNG = np.random.default_rng(0)
X = jnp.asarray(_RNG.normal(size=(8, 4)), jnp.float32)
Y = X @ jnp.asarray(_RNG.normal(size=(4, 3)), jnp.float32)
WEIGHTS = {"w": jnp.zeros((4, 3))}
ADAPTERS = {
  "w": Factors(
    jnp.asarray(_RNG.normal(size=(4, 2)), jnp.float32), jnp.zeros((2, 3))
  )
}


def logits_fn(params, batch):
  if "trained" in params:
    weight = params["weights"]["w"] + params["trained"]["w"].weight()
  else:
    weight = params["w"].weight()
  return batch["x"] @ weight


def losses(params, batch):
  return jnp.mean((logits_fn(params, batch) - batch["y"]) ** 2, axis=-1)


def loss_fn(params, batch):
  return jnp.mean(losses(params, batch))


def code(name):
  """The indented lines of a module's docstring."""
  module = importlib.import_module(f"bilora_jax.baselines.{name}")
  text = module.__doc__ or ""
  lines = re.findall(r"^(?:  .*|)$", text, re.MULTILINE)
  return textwrap.dedent("\n".join(lines)).strip()


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_runs_and_learns(name):
  source = code(name)
  assert "for key, batch in batches:" in source
  batch = {"x": X, "y": Y}
  names = {
    "jax": jax,
    "optax": optax,
    "baselines": baselines,
    "tx": optax.adam(0.1),
    "params": ADAPTERS,
    "adapters": ADAPTERS,
    "weights": WEIGHTS,
    "steps": 12,
    "batches": [(jax.random.key(i), batch) for i in range(12)],
    "logits_fn": logits_fn,
    "loss": lambda logits, batch: jnp.mean((logits - batch["y"]) ** 2),
    "losses": losses,
    "loss_fn": loss_fn,
  }
  exec(source, names)
  trained = names["params"]
  before = {"w": ADAPTERS["w"]}
  after = trained.get("trained", trained)
  start, end = (float(loss_fn(x, batch)) for x in (before, after))
  assert np.isfinite(end) and end < 0.999 * start
