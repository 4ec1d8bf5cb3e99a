"""Holds out rows by a hash of their text, stratified and without leaks."""

import collections
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ..errors import UsageError
from . import hashing


def divide(
  texts: Sequence[str],
  labels: Sequence[Hashable],
  shares: Mapping[str, float],
  name: str,
) -> dict[str, list[int]]:
  """Returns the rows of each split, in their original order.

  Rows with the same text are in the same split. Each split has about its share
  of each label, and at least one row. The other rows are `train`, which has
  every label. Nothing is random: the same rows always give the same splits.

  Args:
    texts: the normalised text of each row.
    labels: the label of each row.
    shares: from the name of each split except `train` to its share.
    name: the name of the rows, for errors.

  Raises:
    UsageError: if there are too few rows.
  """
  rows: dict[str, list[int]] = {}
  for i, text in enumerate(texts):
    rows.setdefault(text, []).append(i)
  by_label: dict[Hashable, list[str]] = collections.defaultdict(list)
  for text in sorted(rows, key=hashing.digest):
    by_label[labels[rows[text][0]]].append(text)
  # Text n of the N texts of a label has the place (n + 1/2) / N. So the texts
  # before any place have the same share of each label. The last text of each
  # label stays in `train`.
  places = sorted(
    ((n + 0.5) / len(same), hashing.digest(text), text)
    for same in by_label.values()
    for n, text in enumerate(same[:-1])
  )
  waiting = iter([text for _, _, text in places])
  found: dict[str, list[int]] = {"train": []}
  for split, share in shares.items():
    wanted = max(1, round(share * len(texts)))
    found[split] = []
    while len(found[split]) < wanted:
      text = next(waiting, None)
      if text is None:
        raise UsageError(
          f"{name} has {len(rows)} different rows of {len(by_label)} label(s),"
          f" too few to hold out {' and '.join(shares)}; give more rows, a"
          " smaller --held-out, or files of their own with --validation and"
          " --test."
        )
      found[split] += rows[text]
  held_out = {i for split in shares for i in found[split]}
  found["train"] = [i for i in range(len(texts)) if i not in held_out]
  return {split: sorted(part) for split, part in found.items()}


def note(
  count: int,
  divided: Mapping[str, Sequence[Any]],
  hashed: str,
  how: str = "",
) -> str:
  """Returns the sentence for the user on rows that are held out."""
  names = {"validation": "validation", "test": "the test"}
  counts = " and ".join(
    f"{len(divided[split]):,} for {name}"
    for split, name in names.items()
    if split in divided
  )
  return (
    f"Of {count:,} rows, {counts} are held out, {how}by a hash of {hashed}; "
    f"{len(divided['train']):,} remain for training."
  )
