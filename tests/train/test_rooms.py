"""Each room of the program imports only rooms below it."""

import pathlib

import grimp
import pytest

_PROGRAM = pathlib.Path(__file__).parents[2] / "train"
# From the bottom to the top; those of a line do not know each other.
_FLOORS = (
  {"errors", "command", "interrupts"},
  {"locks"},
  {"files"},
  {"options"},
  {"checked"},
  {"jsonl", "bounds"},
  {"plugins"},
  {"models"},
  {"data"},
  {"devices"},
  {"methods"},
  {"run"},
  {"finished", "study"},
  {"planning"},
  {"presets"},
  {"config"},
  {"__main__"},
)
_FAMILIES = {
  f"train.models.{folder.name}"
  for folder in (_PROGRAM / "models").iterdir()
  if (folder / "__init__.py").exists() and folder.name != "io"
}


@pytest.fixture(scope="module")
def imports() -> set[tuple[str, str]]:
  """Who imports whom, inside functions too."""
  graph = grimp.build_graph("train", cache_dir=None)
  return {
    (importer, imported)
    for importer in graph.modules
    for imported in graph.find_modules_directly_imported_by(importer)
  }


def _room(module: str) -> str:
  return module.split(".")[1]


def _floor(module: str) -> int:
  (floor,) = (i for i, x in enumerate(_FLOORS) if _room(module) in x)
  return floor


def test_each_room_imports_only_rooms_below_it(imports):
  wrong = {
    (importer, imported)
    for importer, imported in imports
    if _room(importer) != _room(imported)
    and _floor(importer) <= _floor(imported)
  }
  assert not wrong


def test_only_the_command_line_knows_planning(imports):
  knowing = {x for x, imported in imports if _room(imported) == "planning"}
  # The command line imports its commands by name.
  assert {_room(x) for x in knowing} <= {"planning", "__main__"}


def test_no_module_outside_models_imports_a_family(imports):
  assert len(_FAMILIES) >= 4
  wrong = {
    (importer, imported)
    for importer, imported in imports
    if _room(importer) != "models"
    and any(f"{imported}.".startswith(f"{x}.") for x in _FAMILIES)
  }
  assert not wrong
