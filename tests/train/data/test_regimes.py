"""Rows made harder: which labels become wrong, and which rows are left."""

import collections

import numpy as np
import pytest

from train.data import options, regimes
from train.data import registry as tasks
from train.data.options import DataOptions
from train.errors import UsageError

LABELS = np.arange(5000) % 5
MOVIES = tasks.get("rated-sentences/movies")


def test_symmetric_noise_makes_a_share_of_labels_any_other_alike():
  found = regimes.noisy(LABELS, 5, 0.4, "symmetric", "a")
  wrong = found != LABELS
  assert wrong.sum() == 2000
  assert set(found) == set(range(5))
  pairs = collections.Counter(zip(LABELS[wrong], found[wrong]))
  assert len(pairs) == 20
  # Binomial of 2,000 and 1/20: its standard deviation is 9.7.
  assert all(abs(count - 100) < 4 * 9.7 for count in pairs.values())


def test_class_dependent_noise_is_of_every_other_class_and_to_the_one_before():
  found = regimes.noisy(LABELS, 5, 0.4, "class-dependent", "a")
  wrong = found != LABELS
  pairs = collections.Counter(zip(LABELS[wrong], found[wrong]))
  assert set(pairs) == {(1, 0), (3, 2)}
  # Four in ten of the two classes' 2,000 rows.
  assert sum(pairs.values()) == 800


@pytest.mark.parametrize("kind", ["symmetric", "class-dependent"])
def test_noise_is_a_function_of_its_draw(kind):
  def drawn(draw, share=0.3):
    return regimes.noisy(LABELS, 5, share, kind, draw)

  np.testing.assert_array_equal(drawn("a"), drawn("a"))
  assert (drawn("a") != drawn("b")).any()
  np.testing.assert_array_equal(drawn("a", 0.0), LABELS)
  # What is wrong of little noise is wrong of more.
  little, much = drawn("a", 0.1) != LABELS, drawn("a", 0.3) != LABELS
  assert not (little & ~much).any()


def test_two_classes_are_flipped():
  labels = LABELS % 2
  found = regimes.noisy(labels, 2, 0.25, "symmetric", "a")
  assert (found == 1 - labels).sum() == 1250


def test_one_vote_is_that_of_a_rater_and_each_rater_has_a_share():
  votes = [[10 * i, 10 * i + 1, 10 * i + 2, 10 * i + 3] for i in range(4000)]
  found = regimes.one_vote(votes, "a")
  assert all(vote in of_row for vote, of_row in zip(found, votes))
  counts = np.bincount(found % 10)
  # Binomial of 4,000 and 1/4: its standard deviation is 27.
  assert len(counts) == 4 and np.abs(counts - 1000).max() < 4 * 27


@pytest.mark.parametrize("limit", [0, 300])
def test_frequencies_fall_off_exponentially(limit):
  there = {0: 100, 1: 400, 2: 200}
  labels = np.concatenate([np.full(n, k) for k, n in there.items()])
  labels = np.random.RandomState(0).permutation(labels)
  kept = regimes.long_tailed(labels, 3, 0.04, limit)
  counts = np.bincount(labels[kept])
  # 1, 0.2 and 0.04 of the most frequent class's, which is class 1.
  most = 400 if not limit else int(300 / 1.24)
  assert counts.tolist() == [int(most * 0.04), most, int(most * 0.2)]
  assert (np.diff(kept) > 0).all()
  for label in range(3):
    own = np.flatnonzero(labels == label)
    np.testing.assert_array_equal(
      kept[labels[kept] == label], own[: counts[label]]
    )


def test_a_class_that_is_rare_already_decides_how_many_there_are():
  labels = np.array([0] * 50 + [1] * 10)
  kept = regimes.long_tailed(labels, 2, 0.5)
  assert np.bincount(labels[kept]).tolist() == [20, 10]


def _rows(task, split, seed=0, **fields):
  given = DataOptions(task=task.name, train_rows=400, eval_rows=300, **fields)
  options.check(given)
  return regimes.rows(task, split, given, seed)


@pytest.mark.parametrize("name", ["rated-sentences/movies", "digits"])
@pytest.mark.parametrize("noisy_validation", [False, True])
def test_the_test_keeps_its_labels_and_validation_unless_it_is_asked(
  name, noisy_validation
):
  task = tasks.get(name)
  share = {"label_noise": 0.4, "noisy_validation": noisy_validation}
  wrong = {}
  for split in ("train", "validation", "test"):
    rows, notes = _rows(task, split, **share)
    clean, _ = _rows(task, split)
    assert len(rows) == len(clean)
    pairs = [(a["label"], b["label"]) for a, b in zip(rows, clean)]
    wrong[split] = sum(a != b for a, b in pairs)
    # What is read of a row is what it was.
    field = "image" if task.image else "sentence"
    assert all(np.all(a[field] == b[field]) for a, b in zip(rows, clean))
    told = f"{wrong[split]:,} of the {len(rows):,} labels of {split} are wrong."
    assert notes == [told] * (wrong[split] > 0)
  expected = {"train": 160, "validation": 120 * noisy_validation, "test": 0}
  assert wrong == expected


def test_one_rater_s_labels_are_among_the_votes_and_often_not_the_mean_s():
  rows, _ = _rows(MOVIES, "train", one_rater=True)
  clean, _ = _rows(MOVIES, "train")
  assert all(row["label"] in row["votes"] for row in rows)
  wrong = np.mean([a["label"] != b["label"] for a, b in zip(rows, clean)])
  # Of all movies 38.1%; the standard deviation at 400 rows is 2.4%.
  assert abs(wrong - 0.381) < 4 * 0.024
  others, _ = _rows(MOVIES, "train", seed=1, one_rater=True)
  assert [x["sentence"] for x in others] != [x["sentence"] for x in rows]


@pytest.mark.parametrize("count", [20, 50, 100])
def test_few_rows_are_part_of_more(count):
  def sentences(limit):
    given = DataOptions(task=MOVIES.name, train_rows=limit, label_noise=0.4)
    rows, _ = regimes.rows(MOVIES, "train", given, 3)
    return [row["sentence"] for row in rows]

  assert len(sentences(count)) == count
  assert sentences(100)[:count] == sentences(count)


def test_rare_classes_are_told_of_and_are_of_the_training_rows_alone():
  rows, notes = _rows(MOVIES, "train", imbalance=0.1)
  counts = np.bincount([row["label"] for row in rows], minlength=5)
  assert notes == [f"Training rows of each class: {counts.tolist()}."]
  assert len(rows) <= 400 and counts.min() == int(0.1 * counts.max())
  assert _rows(MOVIES, "test", imbalance=0.1) == _rows(MOVIES, "test")


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    (
      {"task": "regression", "path": "a.csv", "label_noise": 0.1},
      "--label-noise is only for classification; got 0.1 with --task regr",
    ),
    (
      {"task": "instructions", "path": "a.csv", "imbalance": 0.1},
      "--imbalance is only for classification; got 0.1 with --task inst",
    ),
    (
      {"one_rater": True},
      "--one-rater is only for --task rated-sentences or .*; got it with",
    ),
    (
      {"noisy_validation": True},
      "--noisy-validation needs --label-noise or --one-rater; got neither",
    ),
  ],
)
def test_what_does_not_go_together_is_refused(fields, told):
  with pytest.raises(UsageError, match=told):
    options.check(DataOptions(**fields))
