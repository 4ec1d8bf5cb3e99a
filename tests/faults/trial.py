"""Tries mutants of a format, one by one: what is read, or how it is refused."""

from collections.abc import Callable
import contextlib
import dataclasses
import pathlib
import random
import re
import signal
from typing import Any
import warnings

import formats
import mutate

from train.errors import RunError, UsageError

SECONDS = 10
"""In which an answer is there, whatever the file is."""
_BARE = re.compile(r"maximum recursion depth|No such device")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a mutant.

  Attributes:
    accepted: whether it was read.
    fault: what is wrong with the program; empty if nothing is.
    value: what was read.
    said: why it was refused.
  """

  accepted: bool
  fault: str = ""
  value: Any = None
  said: str = ""


class Seed:
  """A format's folder, of which one file is another at a time."""

  def __init__(self, name: str, folder: pathlib.Path):
    self.name, self.format, self.folder = name, formats.FORMATS[name], folder
    folder.mkdir(parents=True, exist_ok=True)
    self.format.build(folder)
    self._whole = _contents(folder)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      self.format.open(folder)

  def mutant(self, number: int) -> tuple[str, bytes]:
    """The file that is another in a mutant, and what is in it then."""
    draw = random.Random(f"{self.name} {number}")
    file = draw.choice([*self.format.files])
    change = draw.choice(self.format.files[file])
    return file, change(draw, self._whole[file])

  def same(self, number: int) -> tuple[str, bytes]:
    """A JSON file that is written in another way."""
    draw = random.Random(f"{self.name} {number}")
    names = [x for x in self.format.files if x.endswith(".json")]
    file = draw.choice(names)
    return file, mutate.same_json(draw, self._whole[file])

  def tried(self, file: str, content: bytes) -> Outcome:
    """Reads the folder with another file in it, and puts back the old one."""
    return self._tried(file, lambda path: path.write_bytes(content))

  def without(self, file: str, put: Callable[[pathlib.Path], Any]) -> Outcome:
    """Reads the folder with something else where a file was."""

    def replace(path: pathlib.Path) -> None:
      path.unlink()
      put(path)

    return self._tried(file, replace)

  def _tried(self, file: str, put: Callable[[pathlib.Path], Any]) -> Outcome:
    path = self.folder / file
    put(path)
    before = _contents(self.folder)
    try:
      outcome = self._opened(file)
      changed = _contents(self.folder) != before
    finally:
      if path.is_dir():
        path.rmdir()
      elif not path.is_file():
        path.unlink(missing_ok=True)
      path.write_bytes(self._whole[file])
    if changed:
      _restore(self.folder, self._whole)
      return dataclasses.replace(outcome, fault="files are others than before")
    return outcome

  def _opened(self, file: str) -> Outcome:
    try:
      with warnings.catch_warnings(), _limited():
        warnings.simplefilter("ignore")
        return Outcome(True, value=self.format.open(self.folder))
    except _Late:
      return Outcome(False, f"no answer in {SECONDS} seconds")
    except (KeyboardInterrupt, SystemExit):
      raise
    # Rust's panics are no Exception.
    except BaseException as error:
      return Outcome(False, self._fault(file, error), said=str(error))

  def _fault(self, file: str, error: BaseException) -> str:
    """What is wrong with a refusal, if anything is."""
    said, kind = str(error), type(error)
    allowed = isinstance(error, UsageError | RunError) or kind is ValueError
    if not allowed:
      return f"{kind.__name__}: {said[:300]}"
    if _BARE.search(said):
      return f"a bare error: {said[:300]}"
    name = pathlib.Path(file).name
    # What a tokenizer cannot read is found when a text is there; a task is an
    # option by its value.
    named = (
      *(str(self.folder), name, "--"),
      *("The tokenizer of", "There is no task"),
    )
    if not any(x in said for x in named):
      return f"names no file and no option: {said[:300]}"
    if len(said) > 6000:
      return f"a sentence of {len(said)} characters: {said[:300]}"
    return ""


class _Late(BaseException):
  """The time is up."""


@contextlib.contextmanager
def _limited():
  def late(*_):
    raise _Late

  # Of the processor's time, for machines that do other things too; and of the
  # clock's, for what waits.
  for name, timer, seconds in (
    (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
    (signal.SIGALRM, signal.ITIMER_REAL, 6 * SECONDS),
  ):
    signal.signal(name, late)
    signal.setitimer(timer, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def _restore(folder: pathlib.Path, whole: dict[str, bytes]) -> None:
  for path in folder.rglob("*"):
    if path.is_file() and str(path.relative_to(folder)) not in whole:
      path.unlink()
  for name, content in whole.items():
    (folder / name).write_bytes(content)
