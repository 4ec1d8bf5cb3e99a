"""What needs PyTorch is not for `make test`."""

import importlib.util


def _is_there(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


collect_ignore_glob = ["make_*.py"]
if not _is_there("torch"):
  collect_ignore_glob.append("test_*.py")
