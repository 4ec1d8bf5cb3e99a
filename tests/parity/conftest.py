"""What needs PyTorch is for `make test-parity`, and not for `make test`."""

import importlib.util

collect_ignore_glob = ["make_*.py"]
if importlib.util.find_spec("torch") is None:
  collect_ignore_glob.append("test_*.py")
