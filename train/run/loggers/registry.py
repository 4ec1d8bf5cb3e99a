"""The loggers that `--loggers` adds to those of each run, by name.

To add one is to write a file with a `Logger`, and to `register` it.
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
  """Has `--loggers` take a name.

  Args:
    name: that it takes.
    factory: of the logger of a run.
    package: what pip installs for it, if it needs something that may be
      missing: the module of `name`.
  """
  _FACTORIES[name] = factory
  if package:
    _PACKAGES[name] = package


def check(names: str) -> list[str]:
  """The names of `--loggers`, of loggers that can be made.

  Raises:
    UsageError: with what there is, or what is to be installed.
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
  """The loggers of `--loggers`.

  Raises:
    UsageError: as `check`, or if one cannot be opened.
  """
  found: list[Logger] = []
  for name in check(names):
    try:
      found.append(_FACTORIES[name](opened))
    except Exception as error:  # whatever the package raises
      for logger in found:
        logger.close()
      raise UsageError(
        f"--loggers {name} cannot be opened: {type(error).__name__}: {error}"
      ) from error
  return found


register("wandb", wandb.Wandb, package="wandb")
register("mlflow", mlflow.Mlflow, package="mlflow")
