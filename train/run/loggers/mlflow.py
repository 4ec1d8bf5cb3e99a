"""The logger of MLflow, if `mlflow` or `mlflow-skinny` is installed."""

from collections.abc import Mapping
import importlib
from typing import Any

from ... import checked, files
from .logger import Logger, Opened


class Mlflow(Logger):
  """Logs to a run of MLflow, which a resumed run continues.

  MLFLOW_TRACKING_URI says where the run is. MLFLOW_EXPERIMENT_NAME names the
  experiment; without it, MLflow's default is used.
  """

  def __init__(self, opened: Opened):
    self._mlflow: Any = importlib.import_module("mlflow")
    name = opened.folder / "mlflow_id"
    if name.exists():
      self._mlflow.start_run(run_id=checked.read_text(name))
      return
    run = self._mlflow.start_run(run_name=opened.folder.name)
    self._mlflow.log_params(dict(opened.config))
    files.write_atomically(name, run.info.run_id)

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._mlflow.log_metrics(dict(values), step=step)

  def close(self) -> None:
    self._mlflow.end_run()
