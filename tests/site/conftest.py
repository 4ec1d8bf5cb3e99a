"""What needs a browser is for `make test-site` alone."""

import importlib.util

if importlib.util.find_spec("playwright") is None:
  collect_ignore_glob = ["test_*.py"]
