"""The further loggers that `--loggers` can add to a run, by name.

To add a logger, write a file with a `Logger`, and `register` it.
"""

from collections.abc import Callable
import importlib.util

from ... import options
from ...errors import UsageError
from . import mlflow, wandb
from .logger import Logger, Opened

Factory = Callable[[Opened], Logger]

_FACTORIES: dict[str, Factory] = {}
_PACKAGES: dict[str, str] = {}


def register(name: str, factory: Factory, package: str = "") -> None:
  """Registers a logger for `--loggers`.

  Args:
    name: the name of the logger.
    factory: makes the logger of a run.
    package: the package that pip installs, if the logger needs a module `name`
      that may be missing.
  """
  _FACTORIES[name] = factory
  if package:
    _PACKAGES[name] = package


def check(names: str) -> list[str]:
  """Returns the names in `--loggers`, and checks them.

  Raises:
    UsageError: if a logger is unknown, or its package is missing. The message
      names the known loggers, or the package to install.
  """
  found = [name for name in map(str.strip, names.split(",")) if name]
  for name in found:
    if name not in _FACTORIES:
      raise UsageError(
        f"--loggers takes {options.listed(_FACTORIES)}, separated by commas; "
        f"got {name!r}. --plugins names files that register other loggers."
      )
    package = _PACKAGES.get(name)
    if package and importlib.util.find_spec(name) is None:
      raise UsageError(
        f"--loggers {name} needs a package that is not installed: pip install "
        f"{package}."
      )
  return found


def make(names: str, opened: Opened) -> list[Logger]:
  """Returns the loggers of `--loggers`.

  Raises:
    UsageError: as `check`, or if a logger cannot be opened.
  """
  found: list[Logger] = []
  for name in check(names):
    try:
      found.append(_FACTORIES[name](opened))
    except Exception as error:  # packages may raise any type
      for logger in found:
        logger.close()
      raise UsageError(
        f"--loggers {name} cannot be opened: {type(error).__name__}: {error}"
      ) from error
  return found


register("wandb", wandb.Wandb, package="wandb")
register("mlflow", mlflow.Mlflow, package="mlflow")
