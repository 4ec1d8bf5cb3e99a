"""The snippets: a fixed, clean, leak-free division of a checked file."""

import collections
import gzip
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from train import locks
from train.data import hashing, movie_reviews, pipeline, prepare
from train.data import registry as tasks

SPLITS = ("train", "validation", "test")
TASK = tasks.get("snippets")


@pytest.fixture(scope="module")
def rows(snippets_dir):
  """All rows of each split, read once; not to be changed."""
  return {split: pipeline.load(TASK, split, snippets_dir) for split in SPLITS}


def _write(tmp_path: pathlib.Path, *lines: bytes) -> pathlib.Path:
  path = tmp_path / "reviews.tsv.gz"
  path.write_bytes(gzip.compress(b"\r\n".join(lines)))
  return path


def test_the_file_has_all_published_sentences():
  assert len(movie_reviews.read()) == 10_605


def test_split_sizes(rows):
  assert [len(rows[split]) for split in SPLITS] == [6_500, 1_000, 2_570]


def test_no_sentence_is_in_two_splits_nor_twice_in_one(rows):
  sentences = [
    hashing.normalise(str(row.text)) for split in SPLITS for row in rows[split]
  ]
  assert len(set(sentences)) == len(sentences)


def test_a_sentence_in_other_case_or_punctuation_is_the_same_sentence():
  same = ("A mess!", "a  MESS", "(A) mess...", "\uff21 mess")  # full-width A
  assert {hashing.normalise(text) for text in same} == {"a mess"}


def test_labels_are_balanced_in_each_split(rows):
  for split in SPLITS:
    labels = [row.label for row in rows[split]]
    # Three standard deviations of a fair coin at 1,000 rows are 0.047.
    assert abs(np.mean(labels) - 0.5) < 0.047


def test_the_label_is_the_sign_of_a_rating_that_is_not_near_zero(snippets_dir):
  for row in TASK.source.read("test", snippets_dir):
    assert abs(row["rating"]) >= 0.5
    assert row["label"] == (row["rating"] > 0)


def test_labels_are_named_in_the_order_of_the_builder(snippets_dir):
  source: Any = TASK.source.read("test", snippets_dir)
  names = source.dataset_info.features["label"].names
  assert tuple(names) == TASK.labels


def test_repeated_sentences_take_their_mean_rating_and_first_wording():
  read = [
    movie_reviews.Snippet(1, 1.0, "Good fun."),
    movie_reviews.Snippet(2, 3.0, "good FUN"),
    movie_reviews.Snippet(3, 2.0, "Well..."),
    movie_reviews.Snippet(4, -1.5, "well"),
  ]
  assert movie_reviews.clean(read) == [
    movie_reviews.Snippet(1, 2.0, "Good fun.")
  ]


def test_the_division_does_not_depend_on_the_order_of_the_file():
  read = movie_reviews.read()
  assert collections.Counter(
    s.sentence for s in movie_reviews.clean(read)[:100]
  ) == collections.Counter(
    s.sentence for s in movie_reviews.clean(sorted(read))[:100]
  )


def test_rows_are_stored_by_id(rows):
  divided = movie_reviews.divide(movie_reviews.clean(movie_reviews.read()))
  for split in SPLITS:
    expected = [snippet.sentence for snippet in sorted(divided[split])]
    assert [row.text for row in rows[split]] == expected


def test_the_choice_of_a_seed_is_the_same_in_every_version(snippets_dir):
  # Seen once; a change makes figures of older runs incomparable.
  rows = pipeline.load(TASK, "train", snippets_dir, limit=2000)
  text = "\n".join(str(row.text) for row in rows)
  assert hashing.digest(text).startswith("9b35a974508b")


def test_a_limit_takes_rows_by_seed_and_smaller_ones_are_nested(snippets_dir):
  def load(limit, seed):
    return pipeline.load(TASK, "train", snippets_dir, limit, seed)

  assert load(50, 0) == load(50, 0)
  assert load(50, 0)[:20] == load(20, 0)
  assert load(50, 0) != load(50, 1)
  assert len(set(load(50, 0))) == 50


def test_a_limit_of_no_rows_is_refused_and_one_of_too_many_takes_all(
  snippets_dir,
):
  with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
    pipeline.load(TASK, "train", snippets_dir, 0)
  assert len(pipeline.load(TASK, "train", snippets_dir, 7_000)) == 6_500


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"7\t1.0", "line 2 has 2 columns; it must have 3, sep"),
    (b"7\t1.0\ta\tb", "line 2 has 4 columns"),
    (b"", "line 2 has 1 columns"),
    (b"x\t1.0\tFine.", "line 2 has the id 'x'; it must be a number"),
    (b"7\tgood\tFine.", "line 2 has the rating 'good'; .* from -4 to 4"),
    (b"7\tnan\tFine.", "line 2 has the rating 'nan'"),
    (b"7\t4.5\tFine.", "line 2 has the rating '4.5'"),
    (b"7\t1.0\t...", "line 2 has the sentence '...', without a word"),
    (b"7\t1.0\t\xff", "line 2 is not UTF-8"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = _write(tmp_path, b"6\t2.0\tGood.", line, b"8\t2.0\tGood too.")
  with pytest.raises(ValueError, match=message) as error:
    movie_reviews.read(path)
  assert str(path) in str(error.value)


def test_a_file_cut_short_is_refused(tmp_path):
  path = _write(tmp_path, b"6\t2.0\tGood.")
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError, match="is not a whole gzip file"):
    movie_reviews.read(path)


def test_two_processes_may_prepare_at_once_and_prepare_the_same(rows, tmp_path):
  code = (
    "import sys; from train.data import pipeline, registry as tasks;"
    "print(len(pipeline.load(tasks.get(), 'validation', sys.argv[1])))"
  )
  command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
  processes = [
    subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=pathlib.Path(__file__).parents[3],
    )
    for _ in range(2)
  ]
  for process in processes:
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (0, "1000\n", "")
  assert not list(tmp_path.glob(".preparing-*"))
  for split in SPLITS:
    assert pipeline.load(TASK, split, tmp_path) == rows[split]


def test_the_process_that_prepares_last_reads_what_the_first_prepared(
  tmp_path, monkeypatch
):
  generate = prepare._generate

  def generate_late(*args):
    generate(*args)
    monkeypatch.undo()
    TASK.source.read("train", tmp_path)

  monkeypatch.setattr(prepare, "_generate", generate_late)
  assert len(TASK.source.read("train", tmp_path)) == 6_500
  assert not list(tmp_path.glob(".preparing-*"))


def test_a_failed_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
  def fail():
    raise ValueError("line 3 has the rating 'x'")

  monkeypatch.setattr(movie_reviews, "read", fail)
  with pytest.raises(RuntimeError, match=r"snippets cannot be prepared .*'x'"):
    TASK.source.read("train", tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["originals"]


def test_what_a_kill_has_left_is_removed_and_what_goes_on_is_not(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(movie_reviews, "read", lambda: 1 / 0)
  killed, alive = (tmp_path / f".preparing-{x}" for x in ("killed", "alive"))
  killed.mkdir()
  (killed / "half").touch()
  with locks.taken(alive / locks.FILE):
    with pytest.raises(RuntimeError, match="division by zero"):
      TASK.source.read("train", tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == {"originals", alive.name}


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(RuntimeError, match=r"cannot be written to.*--data-dir"):
    TASK.source.read("train", tmp_path / "file")


def test_the_default_data_folder_is_in_the_users_cache(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
  default = pathlib.Path("/cache/bilora_jax/tfds")
  assert prepare.default_data_dir() == default
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", "/home/me")
  default = pathlib.Path("/home/me/.cache/bilora_jax/tfds")
  assert prepare.default_data_dir() == default


def test_an_unknown_task_or_split_is_refused():
  with pytest.raises(ValueError, match="no task 'sst'; the tasks are snippets"):
    tasks.get("sst")
  with pytest.raises(ValueError, match="no split 'dev'; it has train, valid"):
    pipeline.load(TASK, "dev")


def test_a_file_that_is_not_there_is_told_where_to_find(tmp_path):
  with pytest.raises(ValueError, match=r"is not there: .* in the repository"):
    movie_reviews.read(tmp_path / "none.tsv.gz")
