"""Labels of new rows: formats, columns, order, pairs, values and images."""

import csv
import json

import numpy as np
import PIL.Image
from pyarrow import parquet
import pytest
import vit_cases

from train import __main__ as program
from train.finished import finished as finished_lib


def _predict(*arguments):
  return program.main(["predict", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(finished_by):
  return finished_by("lora")


@pytest.fixture(scope="module")
def data(tmp_path_factory, snippets):
  """Rows of many lengths, in no order of them."""
  path = tmp_path_factory.mktemp("new") / "new.csv"
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["id", "body", "sentence"])
    for i, snippet in enumerate(snippets[:19]):
      writer.writerow([i, "dull", snippet.sentence])
  return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_keep_their_order_in_every_format(
  folder, data, tmp_path, snippets, suffix
):
  out = tmp_path / f"out{suffix}"
  assert _predict("--run", folder, "--data", data, "--out", out) == 0
  if suffix == ".csv":
    rows = list(csv.DictReader(out.read_text().splitlines()))
  elif suffix == ".jsonl":
    rows = list(map(json.loads, out.read_text().splitlines()))
  else:
    rows = parquet.read_table(out).to_pylist()
  texts = [x.sentence for x in snippets[:19]]
  wanted = finished_lib.open_run(folder).predict(texts, batch_size=3)
  found = [[float(x) for x in list(row.values())[1:]] for row in rows]
  np.testing.assert_allclose(found, wanted, atol=1e-6)
  assert list(rows[0]) == [
    "label",
    "probability_negative",
    "probability_positive",
  ]
  assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_column_can_be_named(folder, data, tmp_path):
  out = tmp_path / "out.jsonl"
  more = ("--data", data, "--out", out, "--text-column", "body")
  assert _predict("--run", folder, *more) == 0
  rows = list(map(json.loads, out.read_text().splitlines()))
  assert len(rows) == 19 and all(row == rows[0] for row in rows)


def test_texts_are_told_in_a_table(folder, capsys):
  long = "a very long text " * 20
  texts = ("--text", "a [bold] film", "--text", long)
  assert _predict("--run", folder, *texts) == 0
  shown = capsys.readouterr().out
  assert "[bold]" in shown and "probability_positive" in shown


@pytest.mark.parametrize(
  ("arguments", "part"),
  [
    ((), "got none of them"),
    (("--data", "{data}", "--text", "a"), "got several of them"),
    (("--text", "a", "--text-pair", "b"), "has 1 text(s) in a row; got 2"),
    (("--text", "a", "--text", "b", "--text-pair", "c"), "got 2 and 1"),
    (("--image", "a.png"), "reads texts; give --text"),
    (("--data", "{data}", "--out", "{data}"), "--overwrite replaces it"),
    (("--data", "{data}", "--out", "x.xls"), "--out must end in .csv"),
    (("--data", "{data}", "--out", "no/x.csv"), "a folder that does not exist"),
    (("--data", "{data}", "--text-column", "no"), "--text-column"),
    (("--data", "{data}", "--text-pair-column", "id"), "--text-column"),
    (("--data", "no.csv"), "no.csv is not there"),
    (("--text", "a", "--batch-size", "-1"), "--batch-size must be at least 0"),
  ],
)
def test_what_cannot_be_labelled_is_refused_in_a_sentence(
  folder, data, capsys, arguments, part
):
  arguments = [x.format(data=data) for x in arguments]
  assert _predict("--run", folder, *arguments) == 2
  (error,) = capsys.readouterr().err.splitlines()
  assert part in error


def test_pairs_of_texts_have_values(run, tmp_path, capsys):
  rows = [
    row
    for word in ["the", "a", "and", "of", "to", "is", "in", "it", "that", "as"]
    for row in ((f"{word} film", "good", 4.5), (f"{word} story", "bad", 0.5))
  ]
  data = tmp_path / "pairs.csv"
  with data.open("w", newline="") as file:
    csv.writer(file).writerows([("sentence1", "sentence2", "score"), *rows])
  folder = tmp_path / "run"
  own = ("--task", "regression", "--data", str(data), "--train-rows", "0")
  assert run(folder, *own, "--epochs", "8", "--no-baseline") == 0
  capsys.readouterr()
  pairs = ("--text", "a film", "--text-pair", "a movie")
  assert _predict("--run", folder, *pairs) == 0
  assert "value" in capsys.readouterr().out
  found = finished_lib.open_run(folder).predict([x[:2] for x in rows])
  rmse = np.sqrt(np.mean((found - [x[2] for x in rows]) ** 2))
  out = tmp_path / "found.json"
  more = ("--data", str(data), "--json", str(out))
  assert program.main(["evaluate", "--run", str(folder), *more]) == 0
  told = json.loads(out.read_text())
  assert {"rmse", "pearson", "spearman"} <= set(told)
  assert told["rmse"] == pytest.approx(rmse, abs=1e-5)


def test_images_are_labelled_by_file_and_by_folder(tmp_path, capsys):
  model = vit_cases.write(
    tmp_path / "tiny.onnx", vit_cases.tensors("backbone.")
  )
  images = tmp_path / "images"
  for name, colour in (("dark", 10), ("light", 240)):
    (images / name).mkdir(parents=True)
    for i in range(10):
      image = PIL.Image.new("L", (9, 7), colour + i % 3)
      image.save(images / name / f"{i}.png")
  folder = tmp_path / "run"
  options = ("--task", "classification", "--data", images, "--model", model)
  more = ("--batch-size", "8", "--epochs", "10", "--learning-rate", "0.01")
  more += ("--no-baseline", "--no-compilation-cache", "--run-dir", folder)
  assert program.main([*map(str, ("--method", "lora", *options, *more))]) == 0
  assert program.main(["evaluate", "--run", str(folder)]) == 0
  out = tmp_path / "out.csv"
  assert _predict("--run", folder, "--data", images / "dark", "--out", out) == 0
  whole = list(csv.DictReader(out.read_text().splitlines()))
  assert len(whole) == 10
  capsys.readouterr()
  assert _predict("--run", folder, "--image", images / "dark" / "0.png") == 0
  assert whole[0]["label"] in capsys.readouterr().out
  assert _predict("--run", folder, "--text", "a") == 2
  assert "reads images; give --image" in capsys.readouterr().err
