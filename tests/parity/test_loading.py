"""The lines of a card load an export in PyTorch, and say what the run says.

Run by `make test-parity`.
"""

import contextlib
import io
import pathlib
import re
import tarfile

import pytest

from train import __main__ as program
from train.finished import finished

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Of an encoder and a decoder, with the models beside them."""
  folder = tmp_path_factory.mktemp("runs")
  tests = pathlib.Path(__file__).parents[1]
  with tarfile.open(tests / "train" / "old_runs.tar.gz") as file:
    file.extractall(folder, filter="data")
  return folder


def _said(folder, old, new):
  """What the lines of a card print, with something in place of their own."""
  card = (folder / "README.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
  assert old in code
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile(code.replace(old, new), "README.md", "exec"), {})
  return printed.getvalue().strip()


@pytest.mark.parametrize("more", [(), ("--merged",)])
def test_labels_have_the_run_s_probabilities(runs, monkeypatch, more):
  monkeypatch.chdir(runs)
  out = pathlib.Path(f"encoder-out{len(more)}")
  options = ("--run", "encoder-whole", "--out", str(out), *more)
  assert program.main(["export", *options, "--base-model", "encoder"]) == 0
  label, _, numbers = _said(out, "A text.", "a lovely film").partition(" ")
  opened = finished.open_run("encoder-whole")
  (wanted,) = opened.predict(["a lovely film"])
  assert label == opened.labels[wanted.argmax()]
  found = [float(x) for x in numbers.strip("[]").split(",")]
  assert found == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("more", [(), ("--merged",)])
def test_a_decoder_says_what_generate_says(runs, monkeypatch, capsys, more):
  monkeypatch.chdir(runs)
  out = pathlib.Path(f"decoder-out{len(more)}")
  options = ("--run", "decoder-whole", "--out", str(out), *more)
  assert program.main(["export", *options, "--base-model", "decoder"]) == 0
  said = _said(out, "max_new_tokens=64", "max_new_tokens=8")
  capsys.readouterr()
  prompt = ("--prompt", "Hello!", "--max-new-tokens", "8")
  assert program.main(["generate", "--run", "decoder-whole", *prompt]) == 0
  wanted = capsys.readouterr().out.split("\n", 1)[1].strip()
  assert said == wanted
