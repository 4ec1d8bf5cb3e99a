"""Reads, merges and divides the rated sentences of three domains."""

import bisect
from collections.abc import Iterable, Sequence
import functools
import math
import pathlib
from typing import Any, NamedTuple

from . import hashing, shipped

FILE = shipped.FOLDER / "rated_sentences.tsv.gz"
DOMAINS = ("movies", "products", "tweets")
LABELS = ("very negative", "negative", "neutral", "positive", "very positive")
# Different words, because a decoder distinguishes labels by their first tokens.
WORDS = ("terrible", "negative", "neutral", "positive", "excellent")
EDGES = (-2.0, -0.5, 0.5, 2.0)
"""The ratings between the classes; an edge belongs to the class above it."""
TRAIN_SHARE, VALIDATION_SHARE = 0.4, 0.1


class Sentence(NamedTuple):
  """A sentence and its raters' ratings, from -4 (worst) to 4 (best)."""

  domain: str
  ratings: tuple[int, ...]
  text: str


def read(path: pathlib.Path = FILE) -> list[Sentence]:
  """Returns the sentences of a gzipped file, except those without a word.

  The columns are domain, id, mean rating, ratings and sentence. The mean is
  ignored, because for some tweets it is not the mean of the ratings.

  Raises:
    ValueError: if the file is missing or is not gzip, or a line is invalid. The
      message names the file and the line.
  """
  columns = ("domain", "id", "mean rating", "ratings", "sentence")
  lines = shipped.lines(path, "the rated sentences", columns)
  found = [_parse(values, where) for where, values in lines]
  return [x for x in found if hashing.normalise(x.text)]


def merged(sentences: Iterable[Sentence]) -> list[Sentence]:
  """Returns one sentence per text, in the order of the hash of the text.

  Sentences that differ only in case, punctuation or white space are merged. The
  merged sentence has the first wording and domain, and the ratings of all.
  """
  same: dict[str, Sentence] = {}
  for sentence in sentences:
    text = hashing.normalise(sentence.text)
    first = same.setdefault(text, sentence)
    if first is not sentence:
      same[text] = first._replace(ratings=first.ratings + sentence.ratings)
  return [same[text] for text in sorted(same, key=hashing.digest)]


def divided(sentences: Iterable[Sentence]) -> dict[str, list[Sentence]]:
  """Returns the splits of merged sentences.

  Returns:
    for each domain, all its sentences, such as `movies`, and its own splits,
    such as `movies/train`; and for the three domains together, `train`,
    `validation` and `test`.
  """
  found: dict[str, list[Sentence]] = {
    name: [] for name in ("train", "validation", "test")
  }
  sentences = list(sentences)
  for domain in DOMAINS:
    own = [x for x in sentences if x.domain == domain]
    first = round(TRAIN_SHARE * len(own))
    second = first + round(VALIDATION_SHARE * len(own))
    found[domain] = own
    for name, part in {
      "train": own[:first],
      "validation": own[first:second],
      "test": own[second:],
    }.items():
      found[f"{domain}/{name}"] = part
      found[name] += part
  return found


def rows(sentences: Iterable[Sentence]) -> list[dict[str, Any]]:
  """Returns rows: the label is the class of the mean rating.

  The field `votes` has the class of each rating.
  """
  return [
    {
      "domain": x.domain,
      "sentence": x.text,
      "label": _class(math.fsum(x.ratings) / len(x.ratings)),
      "votes": [_class(rating) for rating in x.ratings],
    }
    for x in sentences
  ]


@functools.cache
def stored() -> dict[str, list[dict[str, Any]]]:
  """Returns the rows of the stored sentences, for each split of `divided`."""
  return {name: rows(x) for name, x in divided(merged(read())).items()}


def _class(rating: float) -> int:
  return bisect.bisect_right(EDGES, rating)


def _parse(values: Sequence[str], where: str) -> Sentence:
  domain, _, _, ratings, text = values
  if domain not in DOMAINS:
    raise ValueError(
      f"{where} has the domain {domain!r}; it must be one of"
      f" {', '.join(DOMAINS)}."
    )
  allowed = {str(rating): rating for rating in range(-4, 5)}
  found = ratings.split(" ")
  wrong = [rating for rating in found if rating not in allowed]
  if wrong:
    raise ValueError(
      f"{where} has the rating {wrong[0]!r}; each must be a whole number from"
      " -4 to 4."
    )
  return Sentence(domain, tuple(allowed[rating] for rating in found), text)
