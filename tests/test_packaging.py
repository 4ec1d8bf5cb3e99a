"""What is installed: the names that it takes, and the program by its own."""

import configparser
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import hatchling.build
import pytest
import yaml

import bilora_jax

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
  """A folder with what the wheel installs."""
  folder = tmp_path_factory.mktemp("wheel")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(_ROOT)
    name = hatchling.build.build_wheel(str(folder))
  with zipfile.ZipFile(folder / name) as wheel:
    wheel.extractall(folder / "site")
  return folder / "site"


def _python(
  installed: pathlib.Path, folder: pathlib.Path, *arguments: str
) -> subprocess.CompletedProcess:
  """Runs Python in a user's folder, who has a `train.py` too."""
  (folder / "train.py").write_text("raise SystemExit('this is not bilora')")
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "80"},
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_wheel_owns_no_name_but_ours_and_no_film_reviews(installed):
  packages = {x.name for x in installed.iterdir() if x.suffix != ".dist-info"}
  assert packages == {"bilora_jax", "bilora_train"}
  ours = {x.relative_to(_ROOT / "train") for x in _modules(_ROOT / "train")}
  there = installed / "bilora_train"
  assert {x.relative_to(there) for x in _modules(there)} == ours
  # What the compiler has to know of GPUs.
  others = [x for x in there.rglob("*") if x.is_file() and x.suffix != ".py"]
  assert {x.suffix for x in others} == {".textproto"}


def _modules(folder: pathlib.Path) -> list[pathlib.Path]:
  return list(folder.rglob("*.py"))


def test_the_version_is_said_once(installed):
  (about,) = installed.glob("*.dist-info")
  metadata = (about / "METADATA").read_text()
  assert f"\nVersion: {bilora_jax.__version__}\n" in metadata
  cited = (_ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {bilora_jax.__version__}\n" in cited


def test_the_script_runs_beside_a_train_of_the_user_s(installed, tmp_path):
  (about,) = installed.glob("*.dist-info")
  scripts = configparser.ConfigParser()
  scripts.read(about / "entry_points.txt")
  module, _, name = scripts["console_scripts"]["bilora"].partition(":")
  script = f"import sys, {module} as m; sys.exit(m.{name}())"
  ran = _python(installed, tmp_path, "-c", script, "--help")
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout.startswith("usage: bilora ")
  assert "python -m train" not in ran.stdout


def test_the_film_reviews_are_said_to_be_elsewhere(installed, tmp_path):
  script = "from bilora_train.data import movie_reviews as x; x.read()"
  ran = _python(installed, tmp_path, "-c", script)
  assert "film reviews are in the repository, and not" in ran.stderr


@pytest.mark.parametrize(
  ("missing", "arguments"),
  [("tyro", ["--help"]), ("grain", []), ("tokenizers", ["generate"])],
)
def test_without_the_extra_the_sentence_names_it(
  installed, tmp_path, missing, arguments
):
  script = (
    f"import sys, runpy; sys.modules[{missing!r}] = None;"
    "runpy.run_module('bilora_train', run_name='__main__', alter_sys=True)"
  )
  ran = _python(installed, tmp_path, "-c", script, *arguments)
  assert ran.returncode == 2, ran.stderr
  assert re.fullmatch(
    rf"error: bilora needs {missing}, .*pip install 'bilora_jax\[train\]'\.\n",
    ran.stderr,
  )


def test_the_workflows_run_targets_on_the_pythons_that_we_name():
  pythons = re.findall(
    r"Python :: (3\.\d+)", (_ROOT / "pyproject.toml").read_text()
  )
  makefile = (_ROOT / "Makefile").read_text()
  for path in (_ROOT / ".github" / "workflows").iterdir():
    workflow = yaml.safe_load(path.read_text())
    for name, job in workflow["jobs"].items():
      matrix = job.get("strategy", {}).get("matrix", {})
      assert matrix.get("python", pythons) == pythons, (path, name)
      for step in job["steps"]:
        for target in re.findall(r"make ([\w-]+)", step.get("run", "")):
          assert f"\n{target}:" in makefile, (path, name, target)


def test_the_changelog_has_the_version():
  version = bilora_jax.__version__
  assert version in (_ROOT / "CHANGELOG.md").read_text()
