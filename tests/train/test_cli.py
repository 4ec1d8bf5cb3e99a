"""The command line: what it explains, what it refuses, what it repeats."""

import ast
import gzip
import inspect
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys

from outcomes import assert_same_outcome, files
import pytest

from train import __main__ as program
from train import config as command_line
from train import options, presets
from train.data import movie_reviews
from train.methods import spec as methods
from train.run import config as config_lib

_REPOSITORY = pathlib.Path(__file__).parents[2]


def _documented(group: type) -> dict[str, str]:
  """The text below each field in the source of a group of options."""
  body = ast.parse(inspect.getsource(group)).body[0].body
  return {
    field.target.id: inspect.cleandoc(text.value.value)
    for field, text in itertools.pairwise(body)
    if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
  }


@pytest.mark.parametrize("method", methods.every())
def test_help_explains_every_option_of_a_method(capsys, method):
  with pytest.raises(SystemExit) as end:
    program.main(["--method", method, "--help"])
  assert end.value.code == 0
  shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
  for group in config_lib.groups(method).values():
    documented = {}
    for kind in reversed(group.__mro__[:-1]):
      documented |= _documented(kind)
    for flag, field in options.fields(group).items():
      words = " ".join(documented[field.name].split()[:4])
      # Boolean options stand as --name, --no-name.
      option = options.spelt(flag)
      assert re.search(rf"{option}\b.*{re.escape(words)}", shown), option


@pytest.mark.parametrize("command", [[], ["predict"], ["compile"]])
def test_help_breaks_a_line_only_where_it_is_full(capsys, command):
  with pytest.raises(SystemExit):
    program.main([*command, "--help"])
  # Without a terminal the boxes are spaces, and lines are filled with them.
  rows = [x for x in capsys.readouterr().out.splitlines() if len(x) == 80]
  texts = [x for x in rows if x.startswith("       ") and x.strip()]
  assert len(texts) > 10
  for row, following in itertools.pairwise(rows):
    # Below a long option, and its choices, the text begins.
    began = row in texts or re.match(" +-.+  ", row.rstrip())
    if began and following in texts:
      word = following.split()[0]
      assert len(f"{row.rstrip()} {word}") > 77, (row, following)


def test_help_names_the_presets(capsys):
  with pytest.raises(SystemExit):
    program.main(["--help"])
  shown = capsys.readouterr().out
  for name in ("--preset", "--from-run", "-lora-sam"):
    assert name in shown
  for name in presets.PRESETS:
    assert name.removesuffix("-lora-sam").removesuffix("-lora") in shown


@pytest.mark.parametrize(
  "command",
  ["", "predict", "evaluate", "generate", "export", "compile", "study"],
)
def test_help_and_a_typo_wait_for_no_array_library(command):
  code = f"""
import sys
from train import __main__ as program
for argument in "--help", "--hepl":
  try:
    program.main([*{command.split()!r}, argument])
  except SystemExit:
    pass
late = {{"jax", "bilora_jax", "flax", "optax", "orbax", "matplotlib", "pandas"}}
print(sorted(late & set(sys.modules)), file=sys.stderr)
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=_REPOSITORY,
  )
  assert done.stderr.splitlines()[-1] == "[]"


def test_without_options_it_is_the_first_preset():
  first = next(iter(presets.PRESETS.values()))
  assert command_line.parse([]) == first


@pytest.mark.parametrize(
  "name", ["snippets-full", "t5-base-glue-cola", "llama3.1-8b-alpaca-lora"]
)
def test_options_change_what_a_preset_sets(name):
  preset = presets.PRESETS[name]
  assert command_line.parse(["--preset", name]) == preset
  changed = command_line.parse(["--seed", "7", f"--preset={name}"])
  assert changed == config_lib.replace(preset, seed=7)


def _sentence(capsys: pytest.CaptureFixture[str]) -> str:
  """The one line on stderr."""
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert lines[0].startswith("error: ")
  return lines[0]


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (["--preset", "nippets"], ["preset", "'nippets'", "snippets-lora"]),
    (["--preset", "snippets", "--from-run", "x"], ["--preset", "--from-run"]),
    (["--from-run", "absent"], ["absent", "config.json"]),
    (["--method", "magic"], ["--method", "magic", "bilora", "lora", "full"]),
    (["--method", "lora", "--rho", "1"], ["--rho", "got --method lora"]),
    (["--method=full"], ["--rank", "--method full does not"]),
    (["--config", "x.yaml", "--from-run", "x"], ["--config", "--from-run"]),
    (["--plugins", "x.py"], ["--plugins x.py", "cannot be imported"]),
    (["--rank", "0"], ["--rank", "at least 1", "got 0"]),
    (["--rho", "-1"], ["--rho", "[0, 1e+06)", "got -1.0"]),
    (["--rho", "nan"], ["--rho", "[0, 1e+06)", "got nan"]),
    (["--task", "nothing"], ["task", "'nothing'", "snippets", "glue/rte"]),
    (["--targets", "nothing"], ["targets", "'nothing'", "layer_0/query"]),
    (["--targets", "("], ["targets", "'('"]),
    (["--model", "absent"], ["'absent'", "minilm"]),
  ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
  run, tmp_path, capsys, monkeypatch, arguments, parts
):
  monkeypatch.chdir(tmp_path)
  assert run(tmp_path / "run", *arguments) == 2
  sentence = _sentence(capsys)
  for part in parts:
    assert part in sentence
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (["--rank", "eight"], ["--rank", "eight"]),
    (["--colour", "blue"], ["--colour"]),
  ],
)
def test_what_cannot_be_parsed_is_named(capsys, arguments, parts):
  with pytest.raises(SystemExit) as end:
    program.main(arguments)
  assert end.value.code == 2
  shown = capsys.readouterr().err
  for part in parts:
    assert part in shown


@pytest.mark.parametrize(
  "arguments, meant",
  [
    (["pretict", "--run", "x"], "predict"),
    (["--task", "clasification", "--data", "rows.csv"], "classification"),
  ],
)
def test_a_typo_gets_the_nearest_there_is(capsys, arguments, meant):
  assert program.main(arguments) == 2
  assert f"Did you mean {meant}?" in capsys.readouterr().err


def test_a_cut_weights_file_is_named(run, tiny_model, tmp_path, capsys):
  model = shutil.copytree(tiny_model, tmp_path / "model")
  weights = model / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-100])
  assert run(tmp_path / "run", "--model", str(model)) == 2
  sentence = _sentence(capsys)
  assert str(weights) in sentence
  assert "not a whole safetensors file" in sentence
  assert not (tmp_path / "run").exists()


def test_a_bad_line_of_data_is_named(run, tmp_path, capsys, monkeypatch):
  data = tmp_path / "reviews.tsv.gz"
  data.write_bytes(gzip.compress(b"1\t2.5\tA joy\n2\tgreat\tA joy too\n"))
  monkeypatch.setattr(movie_reviews.read, "__defaults__", (data,))
  code = run(tmp_path / "run", "--data-dir", str(tmp_path / "prepared"))
  assert code == 2
  sentence = _sentence(capsys)
  for part in (f"{data}, line 2", "'great'", "from -4 to 4"):
    assert part in sentence
  assert not (tmp_path / "run").exists()


def test_a_folder_below_a_file_cannot_be_a_run(run, tmp_path, capsys):
  (tmp_path / "file").write_text("mine")
  assert run(tmp_path / "file" / "run") == 2
  sentence = _sentence(capsys)
  assert f"{tmp_path / 'file' / 'run'} cannot be written" in sentence
  assert files(tmp_path) == {"file": b"mine"}


def test_a_run_of_another_spec_is_refused_and_left_as_it_is(
  run, finished, tmp_path, capsys
):
  folder = shutil.copytree(finished, tmp_path / "run")
  assert run(folder, "--rank", "3", "--seed", "1") == 2
  sentence = _sentence(capsys)
  for part in (str(folder), "rank is 4 there and 3 here", "--run-dir"):
    assert part in sentence
  assert "seed is 0 there and 1 here" in sentence
  assert files(folder) == files(finished)


def test_checkpoints_of_another_spec_are_refused_and_left_as_they_are(
  run, finished, tmp_path, capsys
):
  folder = tmp_path / "run"
  shutil.copytree(finished / "checkpoints", folder / "checkpoints")
  config = (finished / "config.json").read_text()
  assert '"rank": 4' in config
  (folder / "config.json").write_text(config.replace('"rank": 4', '"rank": 3'))
  assert run(folder, "--rank", "3") == 2
  sentence = _sentence(capsys)
  assert "does not fit this run" in sentence
  assert "[16, 4] there and [16, 3] here" in sentence
  assert files(folder / "checkpoints") == files(finished / "checkpoints")


def test_a_run_keeps_the_configuration_it_was_made_with(finished, tiny_config):
  kept = config_lib.from_run(finished)
  assert kept == config_lib.replace(tiny_config, run_dir=str(finished))


def test_from_run_repeats_a_run_bit_for_bit(finished, tmp_path):
  folder = tmp_path / "first"
  folder.mkdir()
  shutil.copy(finished / "config.json", folder)
  assert program.main(["--from-run", str(folder)]) == 0
  assert_same_outcome(finished, tmp_path / "first-repeat")
  kept = json.loads((tmp_path / "first-repeat" / "config.json").read_text())
  ours = json.loads((finished / "config.json").read_text())
  ours["output"]["run_dir"] = str(tmp_path / "first-repeat")
  assert kept == ours


@pytest.mark.parametrize("here", [".", "../first", "../first/"])
def test_from_run_takes_any_path_to_a_folder(tmp_path, monkeypatch, here):
  folder = tmp_path / "first"
  folder.mkdir()
  (folder / "config.json").write_text(config_lib.to_json(config_lib.Config()))
  monkeypatch.chdir(folder)
  repeat = pathlib.Path(command_line.parse(["--from-run", here]).output.run_dir)
  assert repeat.name == "first-repeat"
  assert repeat.resolve().parent == tmp_path.resolve()


def test_the_first_preset_is_the_default_but_not_of_another_task():
  default = command_line.parse([])
  assert default == next(iter(presets.PRESETS.values()))
  # To name what is the default changes nothing.
  assert command_line.parse(["--task", default.data.task]) == default
  assert command_line.parse(["--task", "glue/cola"]) == config_lib.replace(
    config_lib.Config(), task="glue/cola"
  )
  assert command_line.parse(["--preset", "snippets", "--task=glue/rte"]) == (
    config_lib.replace(default, task="glue/rte")
  )


def test_a_yaml_file_sets_options_and_the_command_line_changes_them(tmp_path):
  path = tmp_path / "run.yaml"
  path.write_text("method: lora_sam\nrho: 0.01\nadapter: {rank: 4}\nseed: 3\n")
  found = command_line.parse(["--config", str(path), "--seed", "5"])
  assert found == config_lib.replace(
    config_lib.Config(), method="lora_sam", rho=0.01, rank=4, seed=5
  )


def test_a_run_s_configuration_is_a_file_for_the_next(tmp_path):
  config = config_lib.replace(config_lib.Config(), method="obar", balance=0.5)
  path = tmp_path / "config.json"
  path.write_text(config_lib.to_json(config))
  assert command_line.parse([f"--config={path}"]) == config


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("rank: [", ["not YAML"]),
    ("- rank", ["must be a table"]),
    ("rankk: 4", ["'rankk'", "rank"]),
    ("rank: four", ["rank must be a whole number", "'four'"]),
    ("method: lora\nrho: 0.1", ["--rho", "got --method lora"]),
    ("method: magic", ["--method must be one of", "'magic'"]),
  ],
)
def test_a_yaml_file_that_cannot_be_is_refused(tmp_path, capsys, text, parts):
  path = tmp_path / "run.yaml"
  path.write_text(text)
  assert program.main(["--config", str(path)]) == 2
  sentence = _sentence(capsys)
  for part in (str(path), *parts):
    assert part in sentence
