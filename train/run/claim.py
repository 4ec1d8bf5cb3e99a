"""Claims the folder of a run: for one job at a time, and always for one run.

The processes of a job share a claim; the first process takes the lock.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import re

from .. import files, locks
from ..devices import processes
from ..errors import UsageError
from . import config as config_lib
from . import fingerprint, kept, report
from .config import Config
from .loggers import jsonl

_CONFIG = "config.json"
_OF_A_RUN = (
  *("checkpoints", kept.ADAPTERS, kept.PARAMETERS),
  *(report.RESULTS, jsonl.FILE),
)
"""The files of a run that has begun, except its configuration."""
# `bilora_jax.save_adapters` adds this to the name of an unfinished file.
_PART = re.compile(r"\.[0-9a-f]{32}")


@contextlib.contextmanager
def claimed(config: Config) -> Iterator[pathlib.Path]:
  """Yields the folder of a run, which belongs to this job within the context.

  The folder and its `config.json` are written at once. If the context fails
  before the run writes anything else, the configuration is removed again.

  Raises:
    UsageError: if another command uses the folder, it holds another run, or it
      cannot be written. All processes raise the same error.
  """
  folder, refusal = config.folder(), None
  with contextlib.ExitStack() as stack:
    with processes.first_before_others():
      try:
        if processes.is_first():
          stack.enter_context(
            locks.held(folder / locks.FILE, f"the run's folder {folder}")
          )
          _begin(folder, config, stack)
        # If the first process was refused, there may be no configuration.
        if (folder / _CONFIG).exists():
          _require_same(folder, config_lib.from_run(folder), config)
      except (UsageError, OSError) as error:
        refusal = error
    if processes.any_of(refusal is not None):
      raise refusal or UsageError(
        f"another process of this job was refused {folder}, and says why."
      )
    yield folder


def _begin(
  folder: pathlib.Path, config: Config, stack: contextlib.ExitStack
) -> None:
  """Writes the configuration if there is none; removes unfinished files."""
  for path in (folder / kept.ADAPTERS).glob(".*"):
    if _PART.fullmatch(path.name):
      path.unlink()
  if (folder / _CONFIG).exists():
    return
  there = [name for name in _OF_A_RUN if (folder / name).exists()]
  begun = fingerprint.configuration(folder) if there else None
  if begun is not None:
    _require_same(folder, begun, config)
  elif there:
    raise UsageError(
      f"{folder} has {' and '.join(there)} of a run, but no {_CONFIG}, which "
      f"says which run it is. Put {_CONFIG} back, or give another --run-dir."
    )
  stack.push(lambda kind, *_: kind and _give_up(folder))
  files.write_atomically(folder / _CONFIG, config_lib.to_json(config))


def _require_same(folder: pathlib.Path, begun: Config, config: Config) -> None:
  changed = config_lib.differences(begun, config)
  if changed:
    listed = "; ".join(
      f"{name} is {old!r} there and {new!r} here"
      for name, (old, new) in changed.items()
    )
    raise UsageError(
      f"{folder} holds a run of another configuration: {listed}. Give the "
      "same options to resume it, or another --run-dir."
    )


def _give_up(folder: pathlib.Path) -> None:
  """Removes the configuration, if the folder has no other files of a run."""
  if {path.name for path in folder.glob("*")} <= {_CONFIG, locks.FILE}:
    (folder / _CONFIG).unlink(missing_ok=True)
