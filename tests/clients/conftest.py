"""What needs other people's models is for `make test-clients` alone."""

import importlib.util

from flax import linen as nn
import pytest

if importlib.util.find_spec("kauldron") is None:
  collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="module")
def flax_as_it_was():
  """Undoes what gemma 4.0.1 does to Flax when it is imported.

  Its `nn.Module.param` gives a dtype to every initializer, if only None, and
  those of the Flax Llama of transformers take none.
  """
  param = nn.Module.param
  yield
  nn.Module.param = param
