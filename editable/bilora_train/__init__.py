"""What an editable installation imports by the wheel's name: `train/` itself.

Each module is the one that `train` has, and no copy: what a plugin registers by
the one name is there by the other.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys


class _Same(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds the modules of `bilora_train` in `train`."""

  def find_spec(self, fullname, path=None, target=None):
    del path, target
    if fullname.startswith(f"{__name__}."):
      return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
    return None

  def create_module(self, spec):
    module = importlib.import_module("train" + spec.name.removeprefix(__name__))
    # The import system puts its own in place; `exec_module` undoes that.
    spec.loader_state = module.__spec__
    return module

  def exec_module(self, module):
    spec = module.__spec__
    module.__spec__ = spec.loader_state
    sys.modules[spec.name] = module


sys.meta_path.insert(0, _Same())
__path__: list[str] = []
