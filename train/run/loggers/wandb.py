"""The logger of Weights & Biases, if `wandb` is installed."""

from collections.abc import Mapping
import importlib
import secrets
from typing import Any

from ... import checked, files
from .logger import Logger, Opened


class Wandb(Logger):
  """A run of the project bilora, or of WANDB_PROJECT; the same after a resume.

  What it is logged in to, and whether it is online, is as `wandb` has it.
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
    # Its own steps only grow, and a run that resumes logs some again.
    self._run.define_metric("*", step_metric="step")

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({"step": step, **values})

  def close(self) -> None:
    self._run.finish()
