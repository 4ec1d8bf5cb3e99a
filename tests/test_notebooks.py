"""Every notebook runs from top to bottom, on the CPU."""

import importlib.util
import os
import pathlib

import nbclient
import nbformat
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_NOTEBOOKS = sorted((_ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
# Of Jupyter's own making, and on some platforms only.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_notebook_runs_and_its_asserts_hold(path, tmp_path, monkeypatch):
  # `bilora_train`, by which what is installed goes, is in `editable`.
  monkeypatch.setenv("PYTHONPATH", f"{_ROOT}{os.pathsep}{_ROOT / 'editable'}")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
  ).execute()
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert code and all(cell.execution_count for cell in code)
  if path.stem == "trainers":
    # Its last part runs where Tunix is, as under `make test-clients`.
    there = importlib.util.find_spec("tunix") is not None
    assert ("trained by Tunix" in _printed(code[-1])) is there


def _printed(cell) -> str:
  return "".join(output.get("text", "") for output in cell.outputs)
