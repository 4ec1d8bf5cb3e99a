"""What needs PyTorch to be imported: for `make test-parity`, not `make test`."""

import importlib.util

collect_ignore_glob = ["make_*.py"]
if importlib.util.find_spec("torch") is None:
  collect_ignore_glob.append("test_*.py")
