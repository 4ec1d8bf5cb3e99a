"""The fixtures of the program's tests, for the faults."""

import importlib.util
import pathlib

_PATH = pathlib.Path(__file__).parents[1] / "train" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("fixtures_of_train", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
_FOUND = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FOUND)

snippets, tiny_model = _FOUND.snippets, _FOUND.tiny_model
data_dir, options = _FOUND.data_dir, _FOUND.options
