"""The rated sentences: their division, their classes, and faults of a file."""

import gzip

import numpy as np
import pytest

from train.data import hashing, rated_sentences
from train.data import registry as tasks
from train.data.rated_sentences import DOMAINS, Sentence

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def stored():
  return rated_sentences.stored()


def test_split_sizes(stored):
  assert {domain: len(stored[domain]) for domain in DOMAINS} == {
    "movies": 10_603,
    "products": 3_686,
    "tweets": 4_045,
  }
  sizes = {
    domain: [len(stored[f"{domain}/{split}"]) for split in SPLITS]
    for domain in DOMAINS
  }
  assert sizes == {
    "movies": [4_241, 1_060, 5_302],
    "products": [1_474, 369, 1_843],
    "tweets": [1_618, 404, 2_023],
  }
  for split in SPLITS:
    own = [row for x in DOMAINS for row in stored[f"{x}/{split}"]]
    assert stored[split] == own


def test_no_text_is_in_two_splits_or_domains_nor_twice_in_one(stored):
  texts = [
    hashing.normalise(row["sentence"])
    for split in SPLITS
    for row in stored[split]
  ]
  assert len(texts) == sum(len(stored[domain]) for domain in DOMAINS)
  assert len(set(texts)) == len(texts) and all(texts)


def test_raters_differ_from_the_mean_as_often_as_is_said(stored):
  wrong = {
    domain: np.mean(
      [
        np.mean([vote != row["label"] for vote in row["votes"]])
        for row in stored[domain]
      ]
    )
    for domain in DOMAINS
  }
  # A third to two fifths, as one looks at five classes of means of 15 and more.
  assert wrong["movies"] == pytest.approx(0.380, abs=0.002)
  assert wrong["products"] == pytest.approx(0.316, abs=0.002)
  assert wrong["tweets"] == pytest.approx(0.409, abs=0.002)


def test_a_class_is_between_its_edges():
  rows = rated_sentences.rows(
    [Sentence("movies", (-3, -2, -2), "a"), Sentence("tweets", (2, 1), "b")]
  )
  # Means of -2.33 and 1.5; an edge, as 2, belongs to the class above it.
  assert rows[0] == {
    "domain": "movies",
    "sentence": "a",
    "label": 0,
    "votes": [0, 1, 1],
  }
  assert rows[1]["label"] == 3 and rows[1]["votes"] == [4, 3]


def test_one_text_keeps_its_first_wording_and_all_ratings():
  found = rated_sentences.merged(
    [
      Sentence("movies", (1, 2), "Good fun."),
      Sentence("tweets", (3,), "good FUN"),
    ]
  )
  assert found == [Sentence("movies", (1, 2, 3), "Good fun.")]


def test_tasks_of_a_domain_have_the_others_as_shifted_tests():
  assert [x.name for x in tasks.get("rated-sentences").splits] == [*SPLITS]
  splits = tasks.get("rated-sentences/products").splits
  assert [(x.name, x.stored) for x in splits[3:]] == [
    ("movies", "movies"),
    ("tweets", "tweets"),
  ]


@pytest.mark.parametrize(
  ("line", "told"),
  [
    ("movies\t1\t0.5\tgood", "line 2 has 4 columns; it must have 5, sep"),
    ("films\t1\t0\t0 1\tgood", "line 2 has the domain 'films'; it must be one"),
    ("movies\t1\t0\t0 5\tgood", "line 2 has the rating '5'; each must be a"),
    ("movies\t1\t0\t\tgood", "line 2 has the rating ''; each must be a whole"),
  ],
)
def test_a_fault_of_a_line_is_told_of_with_its_place(line, told, tmp_path):
  path = tmp_path / "rated.tsv.gz"
  good = "movies\t1\t0.5\t0 1\tfine\n"
  path.write_bytes(gzip.compress(f"{good}{line}\n".encode()))
  with pytest.raises(ValueError, match=told):
    rated_sentences.read(path)
  path.write_bytes(gzip.compress(good.encode()))
  assert rated_sentences.read(path) == [Sentence("movies", (0, 1), "fine")]


def test_a_file_that_is_not_there_or_not_whole_is_told_of(tmp_path):
  path = tmp_path / "rated.tsv.gz"
  with pytest.raises(ValueError, match="the rated sentences are in the repo"):
    rated_sentences.read(path)
  path.write_bytes(gzip.compress(b"movies\t1\t0.5\t0 1\tfine\n")[:-9])
  with pytest.raises(ValueError, match="is not a whole gzip file"):
    rated_sentences.read(path)
