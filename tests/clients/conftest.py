"""Models of other people are for `make test-clients`, not for `make test`."""

import importlib.util

if importlib.util.find_spec("kauldron") is None:
  collect_ignore_glob = ["test_*.py"]
