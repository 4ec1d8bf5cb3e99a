"""What needs a browser is for `make test-site`, which names this folder."""

import pathlib

import pytest

_HERE = pathlib.Path(__file__).parent


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
  named = (pathlib.Path(x.split("::")[0]) for x in config.args)
  if any(_HERE in (x.resolve(), x.resolve().parent) for x in named):
    return None
  return True
