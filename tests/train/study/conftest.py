"""A study of the tiny BERT: two methods, one task, two seeds."""

from collections.abc import Callable
import copy
import pathlib
from typing import Any

import pytest

from train.study import spec


@pytest.fixture(scope="session")
def tables(
  tiny_model: pathlib.Path, data_dir: pathlib.Path
) -> Callable[..., dict[str, Any]]:
  """The tables of a study, as TOML has them; `tables(folder, **others)`.

  Those of others that are None are left out.
  """
  found = {
    "study": {"name": "tiny", "seeds": [0, 1], "reference": "LoRA"},
    "defaults": {
      "model": str(tiny_model),
      "data_dir": str(data_dir),
      "train_rows": 32,
      "batch_size": 8,
      "max_length": 16,
      "rank": 4,
      "auxiliary_rank": 4,
      "epochs": 2,
      "learning_rate": 0.01,
      # Whoever runs the tests says where compilations are kept.
      "compilation_cache": False,
    },
    "task": [{"name": "snippets"}],
    "method": [
      {"name": "LoRA", "method": "lora"},
      {
        "name": "Bi-LoRA",
        "method": "bilora",
        "tune": {"rho": [0.05, 0.5]},
      },
    ],
    "tuning": {"trials": 2, "seeds": [100]},
    "sharpness": {"rows": 16, "radii": [0.1, 1], "average": 0, "low_rank": 0},
    "recovery": [{"reference": "LoRA", "target": "Bi-LoRA"}],
    "landscape": {"methods": ["LoRA"], "points": 3, "rows": 16},
  }

  def make(folder: pathlib.Path, **others: Any) -> dict[str, Any]:
    own = copy.deepcopy(found) | others
    own["study"]["folder"] = str(folder)
    return {name: table for name, table in own.items() if table is not None}

  return make


@pytest.fixture(scope="session")
def study(tables) -> Callable[..., spec.Study]:
  """As `tables`, read."""
  return lambda folder, **others: spec.parse(tables(folder, **others))
