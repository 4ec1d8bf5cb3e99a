"""Runs the notebooks and keeps what they print and draw; `make notebooks`.

    python notebooks/remake.py                # all of them
    python notebooks/remake.py quickstart     # one
    python notebooks/remake.py --stamp        # runs none

Each call also stamps the project's address, the `Repository` of pyproject.toml,
into the README's badge, the notebooks' badges and their install cells. While
there is no address, there are no badges, and pip installs by the bare name.
"""

import argparse
import base64
import io
import os
import pathlib
import re
import tempfile
import tomllib

import nbclient
import nbformat
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
_COLAB = "https://colab.research.google.com"
_BADGE = re.compile(r"^\[!\[Open in Colab\].*\n\n", re.MULTILINE)
_REQUIREMENT = re.compile(
  r'(?<= )"?bilora_jax(\[\w+\])?(?: @ git\+[^"\s]+)?"?(?= |$)', re.MULTILINE
)
# The program's log has these, of the machine and not of the method.
_TIMES = re.compile(r"  (?:step_seconds|tokens_per_second) \S+")


def paths(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
  return sorted((root / "notebooks").glob("*.ipynb"))


def execute(path: pathlib.Path, folder: pathlib.Path) -> nbformat.NotebookNode:
  """A notebook as a run in `folder` leaves it, with its outputs cleaned."""
  # `bilora_train`, by which what is installed goes, is in `editable`.
  own = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'editable'}",
    "XDG_CACHE_HOME": str(folder),
    # Its list of fonts takes seconds to make.
    "MPLCONFIGDIR": str(ROOT / ".cache" / "matplotlib"),
  }
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
    notebook,
    timeout=300,
    record_timing=False,
    resources={"metadata": {"path": str(folder)}},
  ).execute(env=os.environ | own)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = _cleaned(cell.outputs, f"{folder}{os.sep}")
  return notebook


def _cleaned(outputs: list, folder: str) -> list:
  """What is printed, in one block, without warnings, times and the folder."""
  kept = []
  for output in outputs:
    if output.output_type == "stream" and output.name != "stdout":
      continue
    data = output.get("data", {})
    text = output.get("text", data.get("text/plain", ""))
    text = _TIMES.sub("", text.replace(folder, ""))
    if "image/png" in data:
      picture = {"image/png": _small(data["image/png"]), "text/plain": text}
      kept.append(nbformat.v4.new_output("display_data", picture))
    elif output.output_type == "execute_result":
      output.data = {"text/plain": text}
      kept.append(output)
    elif kept and kept[-1].output_type == "stream":
      kept[-1].text += text
    else:  # printed, also by rich, which shows HTML
      kept.append(nbformat.v4.new_output("stream", text=text))
  return kept


def _small(picture: str) -> str:
  """A PNG of 64 colours, in base64: a third of the size, and looks the same."""
  image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
  file = io.BytesIO()
  image.quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
  return base64.b64encode(file.getvalue()).decode()


def address(root: pathlib.Path = ROOT) -> str | None:
  """The project's address, in pyproject.toml and nowhere else."""
  project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
  return project.get("urls", {}).get("Repository")


def stamp(root: pathlib.Path = ROOT) -> None:
  """Writes the address where a reader meets it, or takes an old one away."""
  url = address(root)
  for path in paths(root):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.id != "colab"]
    if url:
      badge = nbformat.v4.new_markdown_cell(_badge(url, path.name), id="colab")
      cells.insert(0, badge)
    for cell in cells:
      if cell.cell_type == "code" and "%pip install" in cell.source:
        cell.source = _REQUIREMENT.sub(
          lambda found: _requirement(found[1] or "", url), cell.source
        )
    notebook.cells = cells
    nbformat.write(notebook, path)
  readme = root / "README.md"
  text = _BADGE.sub("", readme.read_text())
  if url:
    title, rest = text.split("\n\n", 1)
    text = f"{title}\n\n{_badge(url, 'quickstart.ipynb')}\n\n{rest}"
  readme.write_text(text)


def _badge(url: str, name: str) -> str:
  owner_and_name = url.removeprefix("https://github.com/").strip("/")
  notebook = f"{_COLAB}/github/{owner_and_name}/blob/main/notebooks/{name}"
  return f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({notebook})"


def _requirement(extra: str, url: str | None) -> str:
  return f'"bilora_jax{extra}{f" @ git+{url}" if url else ""}"'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", help="all of them if none is named")
  parser.add_argument("--stamp", action="store_true", help="run none")
  options = parser.parse_args()
  stamp()
  for path in [] if options.stamp else paths():
    if not options.names or path.stem in options.names:
      with tempfile.TemporaryDirectory() as folder:
        notebook = execute(path, pathlib.Path(folder))
      nbformat.write(notebook, path)
      print(path)


if __name__ == "__main__":
  main()
