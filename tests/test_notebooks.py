"""Every notebook runs, on the CPU, and prints what is committed with it."""

import importlib.util
import pathlib
import re
import shutil

import nbformat
import pytest
import remake

_NOTEBOOKS = remake.paths()
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?%?|[-+]?(?:nan|inf)\b")


@pytest.mark.slow
@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
# Of Jupyter's own making, and on some platforms only.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_notebook_runs_and_its_asserts_hold(path, tmp_path):
  code = _code(remake.execute(path, tmp_path))
  assert code and all(cell.execution_count for cell in code)
  committed = _code(nbformat.read(path, as_version=4))
  if path.stem == "trainers" and importlib.util.find_spec("tunix"):
    # Its last part runs where Tunix is, as under `make test-clients`.
    assert "trained by Tunix" in _printed(code.pop())
  _same(committed[: len(code)], code)


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_and_says_nothing_of_a_machine(path):
  assert path.stat().st_size < 400_000
  for cell in _code(nbformat.read(path, as_version=4)):
    assert "execution" not in cell.metadata
    assert all(x.get("name", "stdout") == "stdout" for x in cell.outputs)
    printed = _printed(cell)
    assert not re.search(r"/(?:home|root|tmp|Users|work|usr)/", printed)
    assert not re.search(r"_seconds|_per_second|it/s|Warning", printed)


def test_a_stale_output_is_found():
  cell = nbformat.v4.new_code_cell("x")
  cell.outputs = [nbformat.v4.new_output("stream", text="loss 0.51\n")]
  stale = nbformat.from_dict(cell)
  stale.outputs[0].text = "loss 0.52\n"
  with pytest.raises(AssertionError):
    _same([stale], [cell])
  stale.metadata.tags = ["varies"]
  _same([stale], [cell])
  stale.outputs[0].text = "error 0.51\n"
  with pytest.raises(AssertionError):
    _same([stale], [cell])
  stale.outputs = []
  with pytest.raises(AssertionError):
    _same([stale], [cell])


def test_the_address_is_stamped_from_one_place_and_taken_away(tmp_path):
  url = "https://github.com/owner/name"
  pyproject = _copied(tmp_path)
  project = re.sub(r"\[project\.urls\]\n(?:.+\n)*", "", pyproject.read_text())
  pyproject.write_text(f'{project}\n[project.urls]\nRepository = "{url}"\n')
  for _ in range(2):  # a second time changes nothing
    remake.stamp(tmp_path)
  for page in _pages(tmp_path):
    assert page.count("[![Open in Colab]") == 1
    assert "/github/owner/name/blob/main/notebooks/" in page
  assert _installed(tmp_path) == {f"bilora_jax{x} @ git+{url}" for x in _EXTRAS}

  pyproject.write_text(project)
  remake.stamp(tmp_path)
  assert not any("[![Open in Colab]" in page for page in _pages(tmp_path))
  assert _installed(tmp_path) == {f"bilora_jax{x}" for x in _EXTRAS}


def test_what_is_committed_has_the_address_of_pyproject(tmp_path):
  _copied(tmp_path)
  remake.stamp(tmp_path)
  assert _pages(tmp_path) == _pages(remake.ROOT)


# The trainers need nothing of the program.
_EXTRAS = ("", "[train]")


def _copied(folder: pathlib.Path) -> pathlib.Path:
  """Copies what is stamped to a folder; returns its pyproject.toml."""
  shutil.copytree(remake.ROOT / "notebooks", folder / "notebooks")
  shutil.copy(remake.ROOT / "README.md", folder)
  return pathlib.Path(shutil.copy(remake.ROOT / "pyproject.toml", folder))


def _pages(root: pathlib.Path) -> list[str]:
  return [x.read_text() for x in (root / "README.md", *remake.paths(root))]


def _installed(root: pathlib.Path) -> set[str]:
  found = (
    re.findall(r'%pip install --quiet \\"(bilora_jax.*?)\\"', page)
    for page in _pages(root)[1:]
  )
  return {requirement for (requirement,) in found}


def _code(notebook) -> list:
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _same(committed, run) -> None:
  for old, new in zip(committed, run, strict=True):
    texts = [" ".join(_printed(cell).split()) for cell in (old, new)]
    if "varies" in old.metadata.get("tags", []):
      texts = [" ".join(_NUMBER.sub(" ", text).split()) for text in texts]
    assert texts[0] == texts[1], f"{old.id}: `make notebooks` remakes it"
    assert _pictures(old) == _pictures(new), old.id


def _pictures(cell) -> int:
  return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def _printed(cell) -> str:
  return "".join(
    output.get("text", output.get("data", {}).get("text/plain", ""))
    for output in cell.outputs
  )
