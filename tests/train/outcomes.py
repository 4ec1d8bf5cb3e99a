"""Runs of the program, and what the tests read from their folders."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import programs
import pytest
import safetensors.numpy

from train import __main__ as program
from train.run import report


def main(arguments: Sequence[str]) -> int:
  """Runs the program without the plot, which takes a third of a tiny run.

  Runs of one configuration have one trace.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, "_plot", lambda *arguments: None)
    programs.share(patch)
    return program.main(arguments)


def adapters(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The final adapters of a run."""
  return safetensors.numpy.load_file(
    folder / "adapters" / "adapters.safetensors"
  )


def checkpoint(folder: pathlib.Path, item: str = "state") -> dict[str, Any]:
  """The arrays of the last (`state`) or best (`evaluated`) checkpoint."""
  kind = folder / "checkpoints" / ("last" if item == "state" else "best")
  newest = max(int(path.name) for path in kind.iterdir())
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore((kind / str(newest) / item).absolute())
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in paths}


def rows(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a run's metrics, each of which is JSON."""
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def files(folder: pathlib.Path) -> dict[str, bytes]:
  """All files below a folder, and what is in them."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def assert_same_bits(
  left: dict[str, np.ndarray], right: dict[str, np.ndarray]
) -> None:
  assert left.keys() == right.keys()
  different = [
    name for name in left if left[name].tobytes() != right[name].tobytes()
  ]
  assert not different


def assert_same_outcome(left: pathlib.Path, right: pathlib.Path) -> None:
  """Asserts that two finished runs ended in the same adapters and state."""
  assert_same_bits(adapters(left), adapters(right))
  assert_same_bits(checkpoint(left), checkpoint(right))
  volatile = {
    *("command", "config", "date", "peak_host_memory_gib"),
    *("median_step_seconds", "median_tokens_per_second"),
  }
  ours, theirs = (
    json.loads((folder / "results.json").read_text())
    for folder in (left, right)
  )
  assert {k: v for k, v in ours.items() if k not in volatile} == {
    k: v for k, v in theirs.items() if k not in volatile
  }


def assert_no_step_twice(folder: pathlib.Path) -> None:
  kinds = [(row["step"], "validation_loss" in row) for row in rows(folder)]
  assert len(kinds) == len(set(kinds))
  assert kinds == sorted(kinds)
