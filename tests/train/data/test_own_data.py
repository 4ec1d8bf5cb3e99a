"""A user's own data: columns, labels, splits, and what is said of them."""

import collections
import csv
import dataclasses
import json
import types
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
import numpy as np
import PIL.Image
import pytest

from train import options as options_lib
from train.data import columns, divide, hashing, load, pipeline, tables
from train.data import registry as tasks
from train.data.options import DataOptions, check
from train.data.task import Source, Task
from train.models import load as models
from train.models.vit.config import IMAGENET

WORDS = ("bad", "good")


def _rows(count=40):
  return [{"text": f"Row {i}.", "label": WORDS[i % 2]} for i in range(count)]


def _csv(folder, rows, name="rows.csv"):
  path = folder / name
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, [*rows[0]])
    writer.writeheader()
    writer.writerows(rows)
  return path


def _fit(path, task="classification", **options):
  options = DataOptions(task=task, path=str(path), **options)
  check(options)
  return columns.fit(tasks.get(task), options)


def _splits(task):
  return {split.name: pipeline.load(task, split.name) for split in task.splits}


@pytest.mark.parametrize(
  ("names", "options", "texts", "label"),
  [
    (("text", "label"), {}, (("text",),), "label"),
    (("id", "Review", "Class"), {}, (("Review",),), "Class"),
    (("said", "label"), {}, (("said",),), "label"),
    (("premise", "hypothesis", "label"), {}, (("premise",), ("hypothesis",)),
     "label"),
    (("title", "body", "label"), {"text": "title, body"}, (("title", "body"),),
     "label"),
    (("a{b}", "c", "d"), {"text": "a{b}", "text_pair": "c", "label": "d"},
     (("a{b}",), ("c",)), "d"),
  ],
)  # fmt: skip
def test_columns_are_named_or_obvious(names, options, texts, label, tmp_path):
  rows = [
    {name: f"{name} {i}" for name in names} | {label: WORDS[i % 2]}
    for i in range(20)
  ]
  task, notes = _fit(_csv(tmp_path, rows), **options)
  assert (task.texts, task.label, task.labels) == (texts, label, WORDS)
  assert f"labels of {label}" in notes[0]
  row = rows[0]
  wanted = ["\n".join(row[name] for name in text) for text in texts]
  assert task.text(row) == (wanted[0] if len(wanted) == 1 else tuple(wanted))


@pytest.mark.parametrize(
  ("names", "options", "message"),
  [
    (
      ("a", "b", "label"),
      {},
      "--text must name .* not obvious.* columns a, b, label",
    ),
    (("text", "b"), {}, "--label must name the .* has the columns text, b"),
    (("text", "label"), {"text": "no"}, "--text is 'no'; .* columns text, lab"),
    (
      ("text", "label"),
      {"text": "text", "text_pair": "b"},
      "--text-pair is 'b",
    ),
    (("text", "label"), {"label": "b"}, "--label is 'b'; .* has the columns"),
    (tuple(f"c{i}" for i in range(99)), {}, r"c7, \.\.\. \(99 in all\)"),
  ],
)
def test_columns_that_are_not_there_are_named(
  names, options, message, tmp_path
):
  path = _csv(tmp_path, [dict.fromkeys(names, "x")])
  with pytest.raises(ValueError, match=message):
    _fit(path, **options)


@pytest.mark.parametrize(
  ("values", "labels"),
  [
    (["10", "9"], ("9", "10")),
    ([1, 0], ("0", "1")),
    ([1.0, 0.0], ("0", "1")),
    ([" b ", "a"], ("a", "b")),
    ([True, False], ("False", "True")),
  ],
)
def test_labels_are_words_or_numbers_in_order(values, labels, tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text(
    "".join(
      json.dumps({"text": f"t {i}", "label": values[i % 2]}) + "\n"
      for i in range(20)
    )
  )
  task, _ = _fit(path)
  assert task.labels == labels
  for row in (row for part in _splits(task).values() for row in part):
    place = int(row.text.split()[1]) % 2
    assert labels[row.label] == str(values[place]).strip().removesuffix(".0")


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ({"text": " "}, "line 6: text is empty"),
    ({"label": ""}, "line 6: label is empty; every row needs a label"),
    ({"text": None}, "line 6: text is empty"),
    ({"label": None}, "line 6: label is empty"),
    (
      {"label": 0.5},
      "line 6: label is 0.5; labels must be words or whole numbers",
    ),
    ({"label": ["a"]}, r"line 6: label is \['a'\]; labels must be words"),
    ({"text": ["a"]}, "line 6: text is of the type list; it must be a text"),
  ],
)
def test_a_row_that_lacks_a_value_is_named(line, message, tmp_path):
  rows = _rows()
  rows[5] |= line
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(ValueError, match=message):
    _fit(path)


def test_labels_that_cannot_be_classes_are_refused(tmp_path):
  one = [row | {"label": "a"} for row in _rows()]
  with pytest.raises(ValueError, match="the one label a in label; a classifi"):
    _fit(_csv(tmp_path, one))
  many = [row | {"label": f"{i / 7}"} for i, row in enumerate(_rows())]
  with pytest.raises(ValueError, match=r"40 different .*--task regression for"):
    _fit(_csv(tmp_path, many))
  new = _csv(tmp_path, [{"text": "a", "label": "new"}], "test.csv")
  with pytest.raises(
    ValueError, match=r"test\.csv, line 2: label is 'new'; .* rows, bad, g"
  ):
    _fit(_csv(tmp_path, _rows()), test=str(new))


@example(counts=[6, 6, 6, 27], share=0.1, copies=2)
@given(
  counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
  share=st.sampled_from([0.02, 0.1, 0.25]),
  copies=st.integers(1, 2),
)
def test_rows_are_held_out_by_label_and_never_leak(counts, share, copies):
  labels = np.repeat(np.arange(len(counts)), counts).tolist() * copies
  texts = [f"{i % (len(labels) // copies)}" for i in range(len(labels))]
  shares = {"validation": share, "test": share}
  try:
    found = divide.divide(texts, labels, shares, "rows.csv")
  except ValueError as error:
    assert "too few to hold out validation and test" in str(error)
    assert len(labels) // copies < len(counts) + 2 + 4 * share * len(labels)
    return
  assert sorted(i for part in found.values() for i in part) == [
    *range(len(labels))
  ]
  words = {split: {texts[i] for i in part} for split, part in found.items()}
  assert sum(map(len, words.values())) == len(set(texts))
  assert {labels[i] for i in found["train"]} == set(labels)
  for split in shares:
    size = len(found[split])
    assert 1 <= size <= max(1, round(share * len(labels))) + copies - 1
    held = collections.Counter(labels[i] for i in found[split])
    for label, count in enumerate(counts):
      # In texts: one, for where a split begins and ends within a label; a
      # rounding of the split's size; and the label's part of what all labels'
      # ones add up to.
      most = 2 + len(counts) * count / sum(counts)
      assert abs(held[label] - share * count * copies) <= most * copies


def test_the_split_is_said_and_does_not_depend_on_the_order(tmp_path):
  rows = _rows()
  task, notes = _fit(_csv(tmp_path, rows))
  assert notes[1] == (
    "Of 40 rows, 4 for validation and 4 for the test are held out, by label and"
    " by a hash of the text; 32 remain for training."
  )
  other, _ = _fit(_csv(tmp_path, rows[::-1], "other.csv"))
  for split, part in _splits(task).items():
    assert sorted(part) == sorted(_splits(other)[split])
  held, _ = _fit(_csv(tmp_path, rows), held_out=0.25)
  assert len(_splits(held)["test"]) == 10


def test_files_of_their_own_are_the_splits(tmp_path):
  parts = {"train": _rows(30), "validation": _rows(40)[30:], "test": _rows(3)}
  paths = {
    name: str(_csv(tmp_path, rows, f"{name}.csv"))
    for name, rows in parts.items()
  }
  task, notes = _fit(
    paths["train"], validation=paths["validation"], test=paths["test"]
  )
  assert {k: len(v) for k, v in _splits(task).items()} == {
    "train": 30,
    "validation": 10,
    "test": 3,
  }
  assert notes[1:] == ["3 of the 3 rows of test are also in train."]
  # What has no file is held out.
  task, _ = _fit(paths["train"], validation=paths["validation"])
  assert [len(part) for part in _splits(task).values()] == [27, 10, 3]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"path": ""}, "--data gives the rows of --task classification, regress"),
    ({"task": "snippets"}, "no other task takes it; got 'a' with --task sn"),
    ({"held_out": 0.5}, r"--held-out must be in \[0, 0.45\); got 0.5"),
    ({"text_pair": "b"}, "--text-pair is the second text .* --text-pair b al"),
    (
      {"chat_template": "a"},
      "--chat-template is only for --task instructions; got",
    ),
    (
      {"held_out": 0.1, "validation": "a", "test": "b"},
      "--held-out has no use",
    ),
    ({"eval_rows": -1}, "--eval-rows must be at least 0; got -1"),
  ],
)
def test_options_that_cannot_be_are_named(options, message):
  found = DataOptions(**({"task": "classification", "path": "a"} | options))
  with pytest.raises(ValueError, match=message):
    options_lib.check(found)
    check(found)


def _load(pretrained, path, task="classification", batch_size=8, **options):
  return load.load(
    DataOptions(task=task, path=str(path), max_length=24, **options),
    models.open_pretrained(str(pretrained)),
    batch_size=batch_size,
    epochs=2,
    seed=0,
  )


def test_what_is_more_than_there_is_is_capped_and_said(tiny_model, tmp_path):
  data = _load(
    tiny_model, _csv(tmp_path, _rows(20)), train_rows=2000, batch_size=32,
    eval_rows=1,
  )  # fmt: skip
  assert data.notes[2:] == [
    "--train-rows is 2,000; train has only 16 rows, and all of them are used.",
    "--batch-size is 32, but there are only 16 rows to train on, so a batch "
    "has 16.",
  ]
  assert data.rows == {"train": 16, "validation": 1, "test": 1}
  assert (data.steps_per_epoch, data.order.batch_size) == (1, 16)
  assert len(list(data.train_batches())) == 2


def test_a_batch_that_is_shared_stays_a_multiple(tiny_model, tmp_path):
  pretrained = models.open_pretrained(str(tiny_model))
  options = DataOptions(
    task="classification", path=str(_csv(tmp_path, _rows(14)))
  )
  more = {"batch_size": 32, "epochs": 1, "seed": 0}
  found = load.load(options, pretrained, **more, multiple=8)
  assert (found.rows["train"], found.order.batch_size) == (12, 8)
  with pytest.raises(ValueError, match=r"12 rows .* a multiple of 16"):
    load.load(options, pretrained, **more, multiple=16)


def test_every_family_of_texts_reads_a_csv(
  tiny_model, tiny_decoder, tiny_t5, tmp_path
):
  path = _csv(tmp_path, _rows())
  for model in (tiny_model, tiny_decoder, tiny_t5):
    data = load.load(
      DataOptions(task="classification", path=str(path)),
      models.open_pretrained(str(model)),
      batch_size=8,
      eval_batch_size=3,
      epochs=1,
      seed=0,
    )
    batch = next(data.train_batches())
    assert batch["tokens"].shape[0] == len(batch["labels"]) == 8
    sizes = []

    def predict(batch, sizes=sizes):
      sizes.append(len(batch["labels"]))
      labels = batch["labels"]
      return load.Items(np.zeros(len(labels)), labels, labels, labels)

    assert data.evaluate(predict, "test").metrics == {"accuracy": 1.0}
    assert sizes == [3, 3]
  digits = _csv(tmp_path, [row | {"label": "x" * (2 + i % 2)} for i, row in
                           enumerate(_rows())], "same.csv")  # fmt: skip
  data = _load(tiny_model, digits)
  assert data.task.labels == ("xx", "xxx")


def test_values_are_standardised_and_scored_in_their_units(
  tiny_model, tiny_decoder, tmp_path
):
  rows = [{"text": f"t {i}", "rating": str(100 + i)} for i in range(40)]
  path = _csv(tmp_path, rows)
  data = _load(tiny_model, path, "regression")
  assert data.task.outputs == 1
  batch = next(data.train_batches())
  assert batch["labels"].dtype == np.float32
  standard = (batch["labels"] - data.task.centre) / data.task.spread
  items = data.objective.items(standard[:, None], batch)
  np.testing.assert_allclose(items.losses, 0, atol=1e-9)
  np.testing.assert_allclose(items.predictions, batch["labels"], rtol=1e-6)

  def off_by_three(batch):
    labels = batch["labels"]
    return items._replace(
      losses=np.ones(len(labels)), predictions=labels + np.float32(3)
    )

  found = data.evaluate(off_by_three, "validation")
  assert found.metrics == {
    "rmse": pytest.approx(3),
    "pearson": pytest.approx(1),
    "spearman": pytest.approx(1),
  }
  assert data.score(found) == pytest.approx(-3)
  assert found.interval() is None

  def features(batch):
    return np.stack([batch["labels"], 1 + 0 * batch["labels"]], 1)

  assert data.baseline(features).metrics["pearson"] > 0.99
  with pytest.raises(ValueError, match="needs an encoder with a new head"):
    _load(tiny_decoder, path, "regression")
  rows[3]["rating"] = "nan"
  with pytest.raises(ValueError, match=r"line 5: rating is 'nan'; .* finite"):
    _load(tiny_model, _csv(tmp_path, rows), "regression")


@dataclasses.dataclass
class _Sizes:
  patch_size: int = 4
  grid: int = 3
  side: int = 0
  mean: tuple[float, ...] = IMAGENET[0]
  deviation: tuple[float, ...] = IMAGENET[1]


@dataclasses.dataclass
class _ReadsImages:
  config: _Sizes = dataclasses.field(default_factory=_Sizes)
  family: Any = dataclasses.field(
    default_factory=lambda: types.SimpleNamespace(
      name="eye", reads="images", has_new_head=True
    )
  )
  path: str = "sees"


def test_a_folder_of_images_is_a_task(tiny_model, tmp_path):
  folder = tmp_path / "photographs"
  for name in ("cat", "dog"):
    (folder / name).mkdir(parents=True)
    for i in range(10):
      pixels = np.full((20, 10 + i, 3), (200, 10 * i, 7), np.uint8)
      image = PIL.Image.fromarray(pixels)
      if i == 0:
        image = image.convert("L")
      image.save(folder / name / f"{i}.{'png' if i % 2 else 'bmp'}")
  options = DataOptions(task="classification", path=str(folder))
  more = {"batch_size": 8, "epochs": 1, "seed": 0}
  data = load.load(options, _ReadsImages(), **more)
  assert data.task.labels == ("cat", "dog")
  # A picture that is in both classes is in one split.
  assert sum(data.rows.values()) == 20
  batch = next(data.train_batches())
  assert batch["images"].shape == (8, 12, 12, 3)
  assert batch["images"].dtype == np.uint8
  assert data.objective.inputs(batch)[0].shape == (8, 12, 12, 3)
  found = load.rows_for(data.task, str(folder), _ReadsImages(), max_length=9)
  assert len(found.rows) == len(found.examples) == 20
  with pytest.raises(
    ValueError, match="has images, and needs a --model that reads"
  ):
    load.load(options, models.open_pretrained(str(tiny_model)), **more)
  # Of another size, that whole patches make up.
  small = dataclasses.replace(options, image_size=8)
  batch = next(load.load(small, _ReadsImages(), **more).train_batches())
  assert batch["images"].shape == (8, 8, 8, 3)
  wrong = dataclasses.replace(options, image_size=7)
  with pytest.raises(ValueError, match=r"multiple of 4, the pixels"):
    load.load(wrong, _ReadsImages(), **more)
  (folder / "cat" / "9.png").write_bytes(b"no")
  with pytest.raises(ValueError, match=r"9\.png cannot be read as an image"):
    load.load(options, _ReadsImages(), **more)


def test_new_rows_are_read_by_a_description(tiny_model, tmp_path):
  pretrained = models.open_pretrained(str(tiny_model))
  data = _load(tiny_model, _csv(tmp_path, _rows()))
  told = json.loads(json.dumps(data.task.description()))
  task = Task.from_description("task.json", told)
  assert task.description() == data.task.description()
  new = [{"id": str(i), "text": f"New {'x ' * i}"} for i in range(5)]
  path = str(_csv(tmp_path, new, "new.csv"))
  given_rows = load.rows_for(task, path, pretrained, max_length=24)
  assert list(given_rows.rows) == new
  answers = given_rows.answers(
    lambda batch: np.eye(2)[batch["index"] % 2], batch_size=2
  )
  np.testing.assert_array_equal(answers, np.eye(2)[np.arange(5) % 2])
  texts = [row["text"] for row in new]
  by_hand = load.rows_for(task, texts, pretrained, max_length=24)
  np.testing.assert_array_equal(
    by_hand.examples.tokens, given_rows.examples.tokens
  )
  # Rows with labels have the run's, and are refused others.
  with pytest.raises(ValueError, match=r"There is no column 'label'; .* id, t"):
    load.rows_for(task, path, pretrained, max_length=24, labelled=True)
  path = str(_csv(tmp_path, [{"sentence": "a", "class": "good"}], "one.csv"))
  one = load.rows_for(task, path, pretrained, max_length=24, labelled=True)
  assert one.examples.labels.tolist() == [1]
  path = str(_csv(tmp_path, [{"text": "a", "label": "fine"}], "two.csv"))
  with pytest.raises(ValueError, match=r"two\.csv, line 2: label is 'fine'"):
    load.rows_for(task, path, pretrained, max_length=24, labelled=True)
  with pytest.raises(ValueError, match=r"1 text\(s\) in a row; got 2"):
    load.rows_for(task, [("a", "b")], pretrained, max_length=24)
  with pytest.raises(ValueError, match=r"task\.json lacks kind, which"):
    Task.from_description("task.json", {"name": "a"})


def test_a_task_from_outside_registers_and_loads(tiny_model, monkeypatch):
  monkeypatch.setattr(tasks, "_BY_NAME", dict(tasks._BY_NAME))
  rows = [{"said": f"word {i}", "label": i % 2} for i in range(24)]
  toy = Task(
    "toy",
    source=Source(
      lambda split, _: rows[:16] if split == "train" else rows[16:]
    ),
    texts=("{said}!",),
    labels=WORDS,
    prompt="is it good?",
  )
  tasks.register(toy)
  assert tasks.get("toy") is toy
  data = load.load(
    DataOptions(task="toy"),
    models.open_pretrained(str(tiny_model)),
    batch_size=8,
    epochs=1,
    seed=0,
  )
  assert data.rows == {"train": 16, "validation": 8, "test": 8}
  with pytest.raises(ValueError, match="There is a task 'toy' already"):
    tasks.register(dataclasses.replace(toy, prompt=""))
  with pytest.raises(
    ValueError, match=r"no task 'none'; .* snippets.*digits, i"
  ):
    tasks.get("none")
  rows[3]["label"] = 2
  with pytest.raises(ValueError, match="train, row 3: label is 2; it must be"):
    pipeline.load(toy, "train")


def test_unlabelled_test_rows_are_left_out(tmp_path):
  folder = tmp_path / "saved"
  from test_tables import write_saved

  rows = [{"text": f"t {i}", "label": i % 2} for i in range(40)]
  hidden = [{"text": f"u {i}", "label": -1} for i in range(4)]
  feature = {"names": ["no", "yes"], "_type": "ClassLabel"}
  write_saved(folder, {"train": rows, "test": hidden}, {"label": feature})
  task, notes = _fit(folder)
  assert task.labels == ("no", "yes")
  assert "The rows of test have no labels and are left out." in notes
  texts = {row.text for row in _splits(task)["test"]}
  assert texts < {row["text"] for row in rows}


def test_texts_of_signs_alone_are_different_texts():
  task = Task("a", texts=(("text",),), labels=WORDS)
  keys = [columns.key(task, {"text": text}) for text in (":-)", ":-(", "A b.")]
  assert keys == [":-)", ":-(", hashing.normalise("a B")]


def test_tables_name_their_splits(tmp_path):
  for split in ("train", "test"):
    (tmp_path / split / "a").mkdir(parents=True)
    PIL.Image.new("RGB", (2, 2)).save(tmp_path / split / "a" / "0.png")
  assert tables.one(tmp_path, "test").path == str(tmp_path / "test")
  with pytest.raises(ValueError, match=r"has the splits .* but no split val"):
    tables.one(tmp_path, "validation")


def _talk(folder, count=20):
  path = folder / "talk.jsonl"
  rows = (
    {"prompt": f"{i}?", "completion": f"It is {i}."} for i in range(count)
  )
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_twenty_conversations_train_with_any_template(tiny_decoder, tmp_path):
  template = tmp_path / "template.jinja"
  template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
  options = {"task": "instructions", "batch_size": 32, "pack": False}
  data = _load(
    tiny_decoder, _talk(tmp_path), chat_template=str(template), **options
  )
  assert data.rows == {"train": 16, "validation": 2, "test": 2}
  assert (data.steps_per_epoch, data.order.batch_size) == (1, 16)
  assert data.notes[1] == (
    "--batch-size is 32, but there are only 16 rows to train on, so a batch "
    "has 16."
  )
  tokenizer = models.open_pretrained(str(tiny_decoder)).tokenizer
  assert tokenizer.decode(next(data.train_batches())["tokens"][0]).startswith(
    "["
  )
  template.write_text("{% for")
  with pytest.raises(ValueError, match=r"--chat-template .* cannot be read"):
    _load(tiny_decoder, _talk(tmp_path), chat_template=str(template), **options)


def test_a_loss_beyond_floats_is_an_infinite_perplexity(tiny_decoder, tmp_path):
  data = _load(tiny_decoder, _talk(tmp_path), "instructions", batch_size=1)

  def lost(batch):
    shape = batch["tokens"].shape
    return load.Items(
      np.full(shape, 800.0), batch["weights"], np.zeros(shape), np.zeros(shape)
    )

  found = data.evaluate(lost, "test")
  assert found.metrics["perplexity"] == np.inf
  assert data.score(found) == -800


def test_rows_longer_than_the_old_buckets_are_read(tiny_decoder, tmp_path):
  rows = [row | {"text": row["text"] * 90} for row in _rows()]
  data = load.load(
    DataOptions(
      task="classification", path=str(_csv(tmp_path, rows)), max_length=512
    ),
    models.open_pretrained(str(tiny_decoder)),
    batch_size=8,
    epochs=1,
    seed=0,
  )
  assert 256 < next(data.train_batches())["tokens"].shape[1] <= 512
