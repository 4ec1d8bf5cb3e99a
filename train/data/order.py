"""The order in which training visits rows: a function of seed and epoch."""

import numpy as np

from . import hashing


def batches(
  lengths: np.ndarray,
  batch_size: int,
  group_by_length: int,
  seed: int,
  epoch: int,
) -> np.ndarray:
  """Returns the rows of each batch of an epoch.

  Args:
    lengths: [rows], the number of tokens of each row.
    batch_size: rows of a batch. Rows that fill no batch are left out.
    group_by_length: if n > 1, the shuffled rows are taken in groups of n
      batches, each group is sorted by length, and the batches are shuffled.
    seed: any integer.
    epoch: the number of the epoch, from 0.

  Returns:
    [rows // batch_size, batch_size] indices into `lengths`, all different.
  """
  whole = len(lengths) // batch_size * batch_size
  rows = _shuffle(len(lengths), hashing.spread(seed, "rows"), epoch)[:whole]
  if group_by_length > 1:
    windows = np.arange(whole) // (batch_size * group_by_length)
    rows = rows[np.lexsort((lengths[rows], windows))]
  rows = rows.reshape(-1, batch_size)
  if group_by_length > 1:
    rows = rows[_shuffle(len(rows), hashing.spread(seed, "batches"), epoch)]
  return rows


def _shuffle(size: int, seed: int, epoch: int) -> np.ndarray:
  # NumPy promises that Philox's raw bits never change; `permutation` may. So
  # an order by raw bits is the same in every version.
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
  return np.argsort(bits.random_raw(size), kind="stable")
