"""Errors that end the program, with a message and an exit code."""


class UsageError(ValueError):
  """The options or the inputs are wrong; exit code 2."""


class RunError(RuntimeError):
  """The run cannot continue, although its options are right; exit code 1."""


class LostError(RunError):
  """Another process of the run cannot be reached any more."""
