"""The logger of Weights & Biases, if `wandb` is installed."""

from collections.abc import Mapping
import importlib
import secrets
from typing import Any

from ... import checked, files
from .logger import Logger, Opened


class Wandb(Logger):
  """Logs to a run of Weights & Biases, which a resumed run continues.

  The project is WANDB_PROJECT, or `bilora`. The settings of `wandb` decide the
  account, and whether the run is online.
  """

  def __init__(self, opened: Opened):
    wandb: Any = importlib.import_module("wandb")
    name = opened.folder / "wandb_id"
    if not name.exists():
      files.write_atomically(name, secrets.token_hex(4))
    self._run = wandb.init(
      project=wandb.Settings().project or "bilora",
      name=opened.folder.name,
      id=checked.read_text(name),
      resume="allow",
      dir=str(opened.folder),
      config=dict(opened.config),
    )
    # wandb's own steps may only grow, but a resumed run logs some steps again.
    self._run.define_metric("*", step_metric="step")

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({"step": step, **values})

  def close(self) -> None:
    self._run.finish()
