"""Loads users' files that add a model, a task, a method or a logger."""

import dataclasses
import importlib
import importlib.util
import pathlib
import sys

from .errors import UsageError
from .options import option


@dataclasses.dataclass(frozen=True)
class PluginOptions:
  """What is added to the program."""

  plugins: str = option("")
  """Python files, or names of modules, separated by commas. They register
  models, tasks, methods or loggers (see docs/extending.md)."""


def load(names: str) -> None:
  """Imports each file or module, once.

  Args:
    names: paths that end in .py, or names of modules, separated by commas.

  Raises:
    UsageError: if a file or module does not exist, or cannot be imported.
  """
  for name in filter(None, map(str.strip, names.split(","))):
    try:
      if name.endswith(".py"):
        _load_file(pathlib.Path(name))
      else:
        importlib.import_module(name)
    except Exception as error:  # a file may raise any error
      raise UsageError(
        f"--plugins {name} cannot be imported: {type(error).__name__}: {error}"
      ) from error


def _load_file(path: pathlib.Path) -> None:
  # Each path gets its own name, which differs from all other modules' names.
  name = f"_plugin_{path.stem}_{abs(hash(path.resolve()))}"
  if name in sys.modules:
    return
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise FileNotFoundError(path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
