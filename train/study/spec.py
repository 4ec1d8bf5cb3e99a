"""Reads and checks the TOML file of a study, before any work starts."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import math
import pathlib
import tomllib
from typing import Any, Literal

from .. import checked, options, plugins
from ..errors import UsageError
from ..run import config as config_lib
from ..run.config import Config

_MOST = 10**5
"""The most seeds, points or rows: more would take weeks and too much memory."""
_FAR = 1e6
_OF_METHODS = ("name", "seeds", "tune", "tasks", "point_of")
_SET_BY_THE_STUDY = {
  "seed": "the study gives the seeds",
  "run_dir": "each run is in the study's folder",
  "mesh": "each worker has one device",
  "profile": "a study traces no steps",
  "loggers": "a study keeps rows",
  "samples": "a study keeps rows",
  "baseline": "a study fits no logistic regression",
  "accept_changes": "a run of a study always starts anew",
  "checkpoint_every": "a run of a study is short, and always starts anew",
}


@dataclasses.dataclass(frozen=True)
class Sharpness:
  """The measurement at the end of each final run; `[sharpness]`.

  Attributes:
    rows: the number of training rows in the loss, which are the same for all
      methods of a seed; 0: no measurement.
    radii: the lengths of a step along the gradient, in units of the weights.
    spaces: "full", the merged kernels of the adapted layers; "lora", the
      factors of the primary adapter.
    average: the number of random directions at each radius, in full space; 0:
      none.
    low_rank: the rank of the worst low-rank step, in full space; 0: none.
    at: "last", the weights after the last step; or "best", the tested weights.
  """

  rows: int = 64
  radii: tuple[float, ...] = (0.05, 0.2, 0.5)
  spaces: tuple[str, ...] = ("full", "lora")
  average: int = 1
  low_rank: int = 8
  at: Literal["last", "best"] = "last"


@dataclasses.dataclass(frozen=True)
class Tuning:
  """The budget of tuning, the same for all tuned methods; `[tuning]`.

  Attributes:
    trials: the number of points in each method's grid.
    seeds: the seeds of each point's runs, which no final run has.
  """

  trials: int
  seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Recovery:
  """The drop in sharpness that methods have a share of; `[[recovery]]`.

  Attributes:
    reference: the label of the method where the drop starts.
    target: the label of the method where the drop ends.
    start: the label of the method where a method's own drop starts; its own
      share is 0.
  """

  reference: str
  target: str
  start: str


@dataclasses.dataclass(frozen=True)
class Landscape:
  """The loss along random, filter-normalised directions; `[landscape]`.

  Attributes:
    methods: the labels of the methods to draw; empty: all.
    seed: the seed of the runs to draw.
    radius: the longest step, as a fraction of each filter's norm.
    points: the points of a line; a plane has `points` squared.
    plane: whether a plane is drawn too.
    rows: the number of training rows in the loss.
  """

  methods: tuple[str, ...] = ()
  seed: int = 0
  radius: float = 1.0
  points: int = 21
  plane: bool = False
  rows: int = 64


@dataclasses.dataclass(frozen=True)
class Cell:
  """A method on a task, with its grid and its seeds.

  Attributes:
    label: the label of the method.
    task: the name of the task in the study.
    config: the configuration, except the seed and the folder of a run.
    grid: the points to try, each with some fields of the configuration; empty
      if the method is not tuned.
    seeds: the seeds of the final runs.
    point_of: the other cell whose winning point this cell takes over, if any.
  """

  label: str
  task: str
  config: Config
  grid: tuple[Mapping[str, Any], ...]
  seeds: tuple[int, ...]
  point_of: "Cell | None" = None

  @property
  def name(self) -> str:
    """The method and the task in the form of `--only`."""
    return f"{self.label}/{self.task}"


@dataclasses.dataclass(frozen=True)
class Study:
  """A study.

  Attributes:
    name: the name in titles.
    folder: the folder of the rows, tables and plots.
    cells: each method on each of its tasks, task by task.
    reference: the label of the method that others are compared with.
  """

  name: str
  folder: pathlib.Path
  cells: tuple[Cell, ...]
  reference: str
  tuning: Tuning | None
  sharpness: Sharpness | None
  recovery: tuple[Recovery, ...]
  landscape: Landscape | None

  @property
  def labels(self) -> tuple[str, ...]:
    """The methods' labels, in the order of the file."""
    return tuple(dict.fromkeys(cell.label for cell in self.cells))

  @property
  def tasks(self) -> tuple[str, ...]:
    """The tasks' names, in the order of the file."""
    return tuple(dict.fromkeys(cell.task for cell in self.cells))


def read(path: pathlib.Path) -> Study:
  """Reads a study.

  Raises:
    UsageError: if the file is invalid. The message names the table and the key,
      the value that was given, and the values that are allowed.
  """
  text = checked.read_text(path)
  try:
    found = tomllib.loads(text)
  except RecursionError as error:
    raise UsageError(f"{path} is nested too deeply.") from error
  except ValueError as error:  # also for a number with too many digits
    raise UsageError(f"{path} is not TOML: {error}.") from error
  try:
    return parse(found)
  except UsageError as error:
    raise UsageError(f"{path}: {error}") from error


def parse(found: Mapping[str, Any]) -> Study:
  """Returns a study from the tables of its file.

  Raises:
    UsageError: as `read`.
  """
  tables = {
    "study": dict,
    "defaults": dict,
    "task": list,
    "method": list,
    "tuning": dict,
    "sharpness": dict,
    "recovery": list,
    "landscape": dict,
  }
  options.known("the file", found, tables, "table")
  for name, kind in tables.items():
    if not isinstance(found.get(name, kind()), kind):
      raise UsageError(
        f"{name} must be written as [{name}]."
        if kind is dict
        else f"{name} must be written as [[{name}]], once for each."
      )
  defaults = found.get("defaults", {})
  plugins.load(checked.field("[defaults]", defaults, "plugins", str, ""))
  head = found.get("study", {})
  options.known("[study]", head, ("name", "folder", "seeds", "reference"))
  name = _text("[study]", head, "name")
  seeds = _seeds("[study]", head.get("seeds", 5))
  tuning = _tuning(found.get("tuning"))
  cells = _cells(found, seeds, tuning)
  labels = list(dict.fromkeys(cell.label for cell in cells))
  reference = head.get("reference", labels[0])
  _label("[study] reference", reference, labels)
  return Study(
    name=name,
    folder=pathlib.Path(_text("[study]", head, "folder", f"runs/{name}")),
    cells=tuple(cells),
    reference=reference,
    tuning=tuning,
    sharpness=_sharpness(found.get("sharpness")),
    recovery=tuple(_recovery(row, labels) for row in found.get("recovery", [])),
    landscape=_landscape(found.get("landscape"), labels),
  )


def _cells(
  found: Mapping[str, Any],
  study_seeds: tuple[int, ...],
  tuning: Tuning | None,
) -> list[Cell]:
  defaults = _fields("[defaults]", found.get("defaults", {}))
  tasks = _tasks(found.get("task", []))
  if not found.get("method"):
    raise UsageError("there is no [[method]]; a study needs at least one.")
  rows = [_method(row, tasks) for row in found["method"]]
  cells, taken_over = [], []
  for task, (task_fields, task_seeds) in tasks.items():
    for row in rows:
      if task not in row["tasks"]:
        continue
      where = f"[[method]] {row['name']!r} on the task {task!r}"
      config = _config(where, defaults | task_fields, row["fields"])
      for point in row["grid"]:
        _changed(f"{where}, tuned with {point}", config, point)
      seeds = row["seeds"] or task_seeds or study_seeds
      cells.append(Cell(row["name"], task, config, row["grid"], seeds))
      taken_over.append(row["point_of"])
  names = [cell.name for cell in cells]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise UsageError(
      f"{', '.join(twice)}: these are there more than once; on a task each "
      "[[method]] needs a name of its own."
    )
  _check_budget(cells, tuning)
  return [
    cell if name is None else _taking_over(cell, name, cells)
    for cell, name in zip(cells, taken_over)
  ]


def _taking_over(cell: Cell, name: str, cells: Sequence[Cell]) -> Cell:
  """Returns the cell with `point_of` set to the cell of that name."""
  where = f"[[method]] {cell.label!r} on the task {cell.task!r}: point_of"
  label, _, task = name.partition("/")
  task = task or cell.task
  of = {(x.label, x.task): x for x in cells if x.grid and x is not cell}
  if (label, task) not in of:
    tuned = ", ".join(x.name for x in of.values()) or "none"
    raise UsageError(
      f"{where} must name a tuned method, as METHOD or METHOD/TASK (here: "
      f"{tuned}); got {name!r}."
    )
  source = of[label, task]
  for point in source.grid:
    _changed(f"{where}, {point}", cell.config, point)
  return dataclasses.replace(cell, point_of=source)


def _tasks(
  rows: Sequence[Any],
) -> dict[str, tuple[dict[str, Any], tuple[int, ...] | None]]:
  tasks = {}
  for row in rows:
    name = _text("[[task]]", row, "name")
    where = f"[[task]] {name!r}"
    if name in tasks:
      raise UsageError(f"{where} occurs twice.")
    seeds = _seeds(where, row["seeds"]) if "seeds" in row else None
    fields = _fields(where, row, ("name", "seeds"))
    tasks[name] = {"task": name} | fields, seeds
  if not tasks:
    raise UsageError("there is no [[task]]; a study needs at least one.")
  return tasks


def _method(row: Any, tasks: Mapping[str, Any]) -> dict[str, Any]:
  name = _text("[[method]]", row, "name")
  where = f"[[method]] {name!r}"
  own = row.get("tasks", list(tasks))
  if (
    not isinstance(own, list) or not own or any(x not in [*tasks] for x in own)
  ):
    raise UsageError(
      f"{where}: tasks must be a list of some of {', '.join(tasks)}; got "
      f"{options.shown(own)}."
    )
  tune = row.get("tune", {})
  if not isinstance(tune, dict) or not all(
    isinstance(values, list) and values for values in tune.values()
  ):
    raise UsageError(
      f"{where}: tune must be a table of lists, such as {{learning_rate = "
      f"[1e-4, 5e-4]}}; got {options.shown(tune)}."
    )
  points = math.prod(map(len, tune.values()))
  if points > _MOST:
    raise UsageError(
      f"{where}: tune must be a grid of at most {_MOST:,} points; got "
      f"{points:,}."
    )
  point_of = _text(where, row, "point_of") if "point_of" in row else None
  if tune and point_of:
    raise UsageError(f"{where} may have tune or point_of; got both.")
  values = [
    [_fields(f"{where}, tune", {key: value})[key] for value in column]
    for key, column in tune.items()
  ]
  grid = tuple(dict(zip(tune, point)) for point in itertools.product(*values))
  return {
    "name": name,
    "tasks": own,
    "point_of": point_of,
    "fields": _fields(where, row, _OF_METHODS),
    "seeds": _seeds(where, row["seeds"]) if "seeds" in row else None,
    "grid": grid if tune else (),
  }


def _check_budget(cells: Sequence[Cell], tuning: Tuning | None) -> None:
  for cell in cells:
    if not cell.grid:
      continue
    if tuning is None:
      raise UsageError(
        f"[[method]] {cell.label!r} has a tune, but there is no [tuning] with "
        "trials and seeds."
      )
    if len(cell.grid) != tuning.trials:
      raise UsageError(
        f"[[method]] {cell.label!r}: tune has {len(cell.grid)} points, and "
        f"[tuning] gives each method {tuning.trials} trials; methods with "
        "fewer hyperparameters get a denser grid of learning rates."
      )
    both = sorted(set(cell.seeds) & set(tuning.seeds))
    if both:
      raise UsageError(
        f"{cell.name}: the seeds {both} are both final seeds and [tuning] "
        "seeds; the two must have none in common."
      )


def _tuning(row: Mapping[str, Any] | None) -> Tuning | None:
  if row is None:
    return None
  options.known("[tuning]", row, ("trials", "seeds"))
  trials = row.get("trials")
  if type(trials) is not int or trials < 1:
    raise UsageError(
      "[tuning] trials must be the number of points of each grid; got "
      f"{options.shown(trials)}."
    )
  return Tuning(trials, _seeds("[tuning]", row.get("seeds")))


def _sharpness(row: Mapping[str, Any] | None) -> Sharpness | None:
  found = plain("[sharpness]", Sharpness, {} if row is None else row)
  spaces = ("full", "lora")
  if not set(found.spaces) <= set(spaces):
    raise UsageError(
      f"[sharpness] spaces must be some of {', '.join(spaces)}; got "
      f"{list(found.spaces)}."
    )
  if not all(0 < radius < _FAR for radius in found.radii):
    raise UsageError(
      f"[sharpness] radii must be greater than 0, and below {_FAR:g}; got "
      f"{options.shown(list(found.radii))}."
    )
  _in_bounds("[sharpness]", found, rows=0, average=0, low_rank=0)
  return found if found.rows and found.radii and found.spaces else None


def _recovery(row: Any, labels: Sequence[str]) -> Recovery:
  keys = ("reference", "target", "start")
  options.known("[[recovery]]", row, keys)
  row = {"start": row.get("reference"), **row}
  for key in keys:
    _label(f"[[recovery]] {key}", row.get(key), labels)
  return Recovery(**row)


def _landscape(
  row: Mapping[str, Any] | None, labels: Sequence[str]
) -> Landscape | None:
  if row is None:
    return None
  found = plain("[landscape]", Landscape, row)
  for label in found.methods:
    _label("[landscape] methods", label, labels)
  _in_bounds("[landscape]", found, points=2, rows=1)
  if not 0 <= found.seed < 2**63:
    raise UsageError(
      "[landscape] seed must be at least 0 and below 2**63; got "
      f"{options.shown(found.seed)}."
    )
  if not 0 < found.radius < _FAR:
    raise UsageError(
      f"[landscape] radius must be greater than 0, and below {_FAR:g}; got "
      f"{found.radius}."
    )
  return found


def _in_bounds(where: str, found: Any, **least: int) -> None:
  for key, value in least.items():
    if not value <= getattr(found, key) <= _MOST:
      raise UsageError(
        f"{where} {key} must be at least {value}, and at most {_MOST:,}; got "
        f"{options.shown(getattr(found, key))}."
      )


def plain(where: str, kind: Any, row: Mapping[str, Any]) -> Any:
  """Returns a dataclass from a table, after a check of the values' types.

  Raises:
    UsageError: if a key is unknown, or a value has a wrong type.
  """
  fields = {field.name: field for field in dataclasses.fields(kind)}
  options.known(where, row, fields)
  return kind(
    **{
      key: options.checked(where, key, value, fields[key].type)
      for key, value in row.items()
    }
  )


def _config(
  where: str, shared: Mapping[str, Any], of_method: Mapping[str, Any]
) -> Config:
  """Returns the configuration of a method on a task.

  Args:
    where: the place in the file, for messages.
    shared: options of the study and of the task; options that the method lacks
      are ignored.
    of_method: options of the method, which must have all of them.
  """
  method = of_method.get("method", shared.get("method"))
  named = {} if method is None else {"method": method}
  try:
    config = config_lib.build(
      {**config_lib.fitting({**shared, **named}), **of_method}
    )
  except UsageError as error:
    raise UsageError(f"{where}: {error}") from error
  return _changed(where, config, {"baseline": False})


def _changed(where: str, config: Config, changes: Mapping[str, Any]) -> Config:
  """Returns a configuration with changed options, and checks it."""
  try:
    changed = config_lib.replace(config, **changes)
    config_lib.check(changed)
  except UsageError as error:
    raise UsageError(f"{where}: {error}") from error
  return changed


def _fields(
  where: str, row: Any, besides: Sequence[str] = ()
) -> dict[str, Any]:
  """Returns a table's options, after a check of their types."""
  kinds = config_lib.kinds()
  options.known(where, row, [*besides, *kinds])
  fields = {}
  for key, value in row.items():
    if key in besides:
      continue
    if key in _SET_BY_THE_STUDY:
      raise UsageError(
        f"{where}: {key} cannot be set in a study: {_SET_BY_THE_STUDY[key]}."
      )
    fields[key] = options.checked(where, key, value, kinds[key])
  return fields


def _text(where: str, row: Any, key: str, default: str | None = None) -> str:
  value = row.get(key, default) if isinstance(row, Mapping) else None
  if not isinstance(value, str) or not value or not options.is_text(value):
    raise UsageError(
      f"{where} {key} must be a text; got {options.shown(value)}."
    )
  return value


def _label(where: str, label: Any, labels: Sequence[str]) -> None:
  if label not in labels:
    raise UsageError(
      f"{where} must be the name of a [[method]]: {', '.join(labels)}; got "
      f"{options.shown(label)}."
    )


def _seeds(where: str, value: Any) -> tuple[int, ...]:
  """Returns seeds from a list, or 0, 1, ... from their number."""
  seeds: Any = value
  if type(value) is int and 0 <= value <= _MOST:
    seeds = list(range(value))
  good = (
    isinstance(seeds, list)
    and bool(seeds)
    and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    and len(set(seeds)) == len(seeds)
  )
  if not good:
    raise UsageError(
      f"{where} seeds must be their number, at most {_MOST:,}, or a list of "
      "different whole numbers, at least 0 and below 2**63; got "
      f"{options.shown(value)}."
    )
  return tuple(seeds)
