"""Other people's models are not for `make test`, but for `make test-clients`."""

import importlib.util

if importlib.util.find_spec("kauldron") is None:
  collect_ignore_glob = ["test_*.py"]
