"""Movie review snippets: read, cleaned, divided, and built for TFDS."""

import collections
from collections.abc import Iterator, Mapping, Sequence
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from . import hashing, shipped

FILE = shipped.FOLDER / "movie_review_snippets.tsv.gz"
TRAIN_ROWS = 6_500
VALIDATION_ROWS = 1_000
MIN_RATING = 0.5


class Snippet(NamedTuple):
  """A sentence and its mean human rating, from -4 (worst) to 4 (best)."""

  id: int
  rating: float
  sentence: str


def read(path: pathlib.Path = FILE) -> list[Snippet]:
  """Returns the snippets of a gzipped file.

  Its columns are id, rating and sentence.

  Raises:
    ValueError: if the file is missing or is not gzip, or if a line is not
      UTF-8, does not have three columns, or has an invalid id, rating or
      sentence. The message names the file and the line.
  """
  columns = ("id", "rating", "sentence")
  lines = shipped.lines(path, "the film reviews", columns)
  return [_parse(values, where) for where, values in lines]


def clean(snippets: list[Snippet]) -> list[Snippet]:
  """Returns one snippet per sentence, without nearly neutral snippets.

  Sentences that differ only in case, punctuation or white space count as one
  sentence. The merged snippet has the first wording and the mean of the
  ratings. If this mean is nearly neutral, the snippet is dropped.

  Args:
    snippets: any number of snippets.

  Returns:
    the snippets whose mean rating is at least `MIN_RATING` in absolute value,
    in the order of the hash of their text.
  """
  same = collections.defaultdict(list)
  for snippet in snippets:
    same[hashing.normalise(snippet.sentence)].append(snippet)
  kept = {}
  for text, group in same.items():
    rating = math.fsum(snippet.rating for snippet in group) / len(group)
    if abs(rating) >= MIN_RATING:
      kept[hashing.digest(text)] = group[0]._replace(rating=rating)
  return [kept[digest] for digest in sorted(kept)]


def divide(snippets: list[Snippet]) -> dict[str, list[Snippet]]:
  """Returns the train, validation and test splits of cleaned snippets."""
  end = TRAIN_ROWS + VALIDATION_ROWS
  return {
    "train": snippets[:TRAIN_ROWS],
    "validation": snippets[TRAIN_ROWS:end],
    "test": snippets[end:],
  }


class MovieReviewSnippets(tfds.core.GeneratorBasedBuilder):
  """10,605 sentences of Rotten Tomatoes reviews with mean human ratings.

  Hutto and Gilbert, ICWSM 2014, from vaderSentiment (MIT licence).
  """

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Sentences of film reviews; is their mean rating positive?",
      features=tfds.features.FeaturesDict(
        {
          "id": np.int32,
          "rating": np.float32,
          "sentence": tfds.features.Text(),
          "label": tfds.features.ClassLabel(names=["negative", "positive"]),
        }
      ),
      homepage="https://github.com/cjhutto/vaderSentiment",
      license="MIT",
      citation=_CITATION,
      disable_shuffling=True,  # stored by id; training shuffles
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, Mapping[str, Any]]]]:
    del dl_manager  # The file comes with the repository.
    splits = divide(clean(read()))
    return {
      name: self._generate_examples(rows) for name, rows in splits.items()
    }

  def _generate_examples(
    self, snippets: list[Snippet]
  ) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for snippet in snippets:
      label = "positive" if snippet.rating > 0 else "negative"
      yield snippet.id, {**snippet._asdict(), "label": label}


def _parse(values: Sequence[str], where: str) -> Snippet:
  number, rating, sentence = values
  if not (number.isascii() and number.isdigit()):
    raise ValueError(f"{where} has the id {number!r}; it must be a number.")
  try:
    value = float(rating)
  except ValueError:
    value = math.nan
  if not -4 <= value <= 4:
    raise ValueError(
      f"{where} has the rating {rating!r}; it must be a number from -4 to 4."
    )
  if not hashing.normalise(sentence):
    raise ValueError(f"{where} has the sentence {sentence!r}, without a word.")
  return Snippet(int(number), value, sentence)


_CITATION = """\
@inproceedings{hutto2014vader,
  title={{VADER}: A Parsimonious Rule-Based Model for Sentiment Analysis of
         Social Media Text},
  author={Hutto, C.J. and Gilbert, Eric},
  booktitle={Proceedings of the Eighth International AAAI Conference on
             Weblogs and Social Media},
  year={2014}
}
"""
