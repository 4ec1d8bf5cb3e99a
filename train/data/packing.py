"""Tokenized conversations to batches of next tokens, packed or not."""

import bisect
import dataclasses

import grain
import numpy as np

from . import batching, pipeline
from .batching import Batch
from .chat import Sequences


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
  """Sequences, and which sequences share a row.

  Attributes:
    sequences: the tokens.
    members: [sequences] int64, the sequences in the order of their rows.
    offsets: [rows + 1] int64; row i has the sequences
      `members[offsets[i]:offsets[i + 1]]`.
    buckets: the lengths that a batch may have, increasing.
  """

  sequences: Sequences
  members: np.ndarray
  offsets: np.ndarray
  buckets: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def lengths(self) -> np.ndarray:
    """[rows] int64, the number of tokens of each row."""
    ends = np.cumsum(self.sequences.lengths[self.members])
    return np.diff(np.concatenate([[0], ends])[self.offsets])

  @property
  def segments(self) -> int:
    """The largest number of sequences in a row, at least 1."""
    return int(np.diff(self.offsets).max(initial=1))


def pack(sequences: Sequences, max_length: int) -> Packed:
  """Packs sequences into rows of `max_length` tokens.

  The sequences are placed from the longest to the shortest, each into the row
  where the least space remains. The rows are the same in every epoch, so their
  number is known before training.

  Args:
    sequences: each of at most `max_length` tokens.
    max_length: the length of a row.

  Raises:
    ValueError: if a sequence is longer than a row.
  """
  lengths = sequences.lengths.tolist()
  if lengths and max(lengths) > max_length:
    raise ValueError(
      f"Sequence {int(np.argmax(lengths))} has {max(lengths)} tokens, more than"
      f" the {max_length} of a row; tokenize with a smaller max_length."
    )
  rows: list[list[int]] = []
  free: list[tuple[int, int]] = []  # (room, row), increasing
  for i in np.argsort(-sequences.lengths, kind="stable").tolist():
    found = bisect.bisect_left(free, (lengths[i], 0))
    if found < len(free):
      room, row = free.pop(found)
    else:
      room, row = max_length, len(rows)
      rows.append([])
    rows[row].append(i)
    if room > lengths[i]:
      bisect.insort(free, (room - lengths[i], row))
  return Packed(
    sequences=sequences,
    members=np.asarray([i for row in rows for i in row], np.int64),
    offsets=np.cumsum([0, *map(len, rows)]),
    buckets=(max_length,),
  )


def unpacked(sequences: Sequences, max_length: int) -> Packed:
  """Gives each sequence its own row, which is padded to a bucket.

  A batch has the smallest length of `pipeline.lengths_for` that holds the
  longest row of the global batch, and at most `max_length`.

  Args:
    sequences: each of at most `max_length` tokens.
    max_length: the most tokens of a row.
  """
  longest = int(sequences.lengths.max(initial=0))
  lengths = pipeline.lengths_for(longest, max_length)
  buckets = sorted({min(length, max_length) for length in lengths})
  rows = np.arange(len(sequences))
  return Packed(sequences, rows, np.append(rows, len(rows)), tuple(buckets))


def train_batches(
  packed: Packed,
  batch_size: int,
  seed: int,
  epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  pad_id: int = 0,
  group_by_length: int = 0,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator over training batches, shuffled anew in each epoch.

  The order, the state and the parts are as in `pipeline.train_batches`.

  Args:
    packed: the training rows; an epoch has `len(packed) // batch_size` steps.
    batch_size: rows of the global batch. Rows that fill no batch are left out
      of their epoch.
    seed: any integer.
    epochs: the number of epochs; None: endless.
    process_index: which of the equal parts of each global batch to return.
    process_count: the number of parts.
    pad_id: the token id beyond a row's end.
    group_by_length: see `pipeline.train_batches`.

  Returns:
    an iterator of dicts, with B = batch_size / process_count and L a bucket:
      tokens: [B, L] int32.
      lengths: [B, M] int32, the tokens of each segment of a row, in order,
        then 0; M is the largest number of segments in a row of `packed`.
      positions: [B, L] int32, from 0 in each segment; 0 on padding.
      targets: [B, L] int32, the next token of the segment; 0 if there is none.
      weights: [B, L] float32, 1 where the target is to be learned.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """

  def fill(rows: np.ndarray, width: int) -> Batch:
    return _fill(packed, rows, width, pad_id)

  return batching.train(
    fill,
    packed.lengths,
    batch_size,
    seed,
    epochs,
    process_index,
    process_count,
    packed.buckets,
    group_by_length,
  )


def eval_batches(
  packed: Packed,
  batch_size: int,
  pad_id: int = 0,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator that gives every row once, the longest rows first.

  The last batch is filled with copies of its first row, with weight 0.

  Args:
    packed: the rows, at least one.
    batch_size: rows of a batch.
    pad_id: the token id beyond a row's end.

  Returns:
    an iterator of dicts with the arrays of `train_batches`.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """

  def fill(rows: np.ndarray, width: int, index: np.ndarray) -> Batch:
    batch = _fill(packed, rows, width, pad_id)
    batch["weights"] *= (index >= 0)[:, None]
    return batch

  return batching.evaluate(fill, packed.lengths, batch_size, packed.buckets)


def _fill(packed: Packed, rows: np.ndarray, width: int, pad_id: int) -> Batch:
  """Returns the batch of some rows, which holds segment after segment."""
  shape = len(rows), width
  tokens = np.full(shape, pad_id, np.int32)
  positions, targets = np.zeros((2, *shape), np.int32)
  lengths = np.zeros((len(rows), packed.segments), np.int32)
  weights = np.zeros(shape, np.float32)
  sequences = packed.sequences
  for i, row in enumerate(rows):
    start = 0
    members = packed.members[packed.offsets[row] : packed.offsets[row + 1]]
    for segment, member in enumerate(members):
      source = slice(*sequences.offsets[member : member + 2])
      ids, loss = sequences.tokens[source], sequences.loss[source]
      stop = start + len(ids)
      tokens[i, start:stop] = ids
      lengths[i, segment] = len(ids)
      positions[i, start:stop] = np.arange(len(ids))
      # The last token of a segment has no next token.
      targets[i, start : stop - 1] = ids[1:]
      weights[i, start : stop - 1] = loss[1:]
      start = stop
  return {
    "tokens": tokens,
    "lengths": lengths,
    "positions": positions,
    "targets": targets,
    "weights": weights,
  }
