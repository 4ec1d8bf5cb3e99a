"""What the program ends with: a sentence, and an exit code."""


class UsageError(ValueError):
  """The request cannot be carried out as it was put; exit code 2."""


class RunError(RuntimeError):
  """The run cannot go on, though it was well asked for; exit code 1."""


class LostError(RunError):
  """Another process of the run is gone."""
