"""Means over seeds, their intervals, and exact tests of paired differences."""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

DRAWS = 100_000
"""How often signs are drawn if the ways to give them are more."""
EXACT_PAIRS = int(math.log2(DRAWS))
"""Up to so many pairs all signs are gone through."""
RESAMPLES = 10_000
"""Of seeds, in a bootstrap."""

_LEVEL = 0.95
# Signs of so many resamples are in memory at once.
_BATCH = 10_000
# Sums of the same numbers in another order differ by rounding alone.
_DIGITS = 9


class Estimate(NamedTuple):
  """A mean over seeds.

  Attributes:
    mean: of them.
    half: half of the 95% t-interval's width; None for a single seed.
    seeds: how many.
  """

  mean: float
  half: float | None
  seeds: int

  @property
  def interval(self) -> tuple[float, float] | None:
    """The interval's ends."""
    if self.half is None:
      return None
    return self.mean - self.half, self.mean + self.half


class Share(NamedTuple):
  """A recovered share.

  Attributes:
    share: ratio of means; None where the denominator is 0.
    interval: 95%, of the bootstrap; None where there is none.
    defined: whether the target's interval is on one side of the reference.
    seeds: how many.
  """

  share: float | None
  interval: tuple[float, float] | None
  defined: bool
  seeds: int


def mean(values: Sequence[float]) -> Estimate | None:
  r"""The mean of independent values with its t-interval; None for no values.

  .. math:: \bar x \pm t_{0.975,\, n - 1}\, s / \sqrt n

  Examples:
    >>> mean([1.0, 2.0, 3.0])
    Estimate(mean=2.0, half=2.484..., seeds=3)
  """
  count = len(values)
  if not count:
    return None
  found = float(np.mean(values))
  if count == 1:
    return Estimate(found, None, 1)
  error = float(np.std(values, ddof=1)) / math.sqrt(count)
  factor = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1))
  return Estimate(found, factor * error, count)


def differences(
  left: Mapping[int, float], right: Mapping[int, float]
) -> list[float]:
  """`left - right` by seed, of the seeds that both have, in their order."""
  return [left[seed] - right[seed] for seed in sorted(set(left) & set(right))]


def sign_flip(values: Sequence[float]) -> float | None:
  r"""p that the mean of paired differences is 0, two-sided; None for no pair.

  If the two of each pair are exchangeable, all signs are equally likely:

  .. math::
    p = 2^{-n} \left|\left\{\epsilon \in \{-1, 1\}^n : \left|\sum_i
    \epsilon_i d_i\right| \ge \left|\sum_i d_i\right|\right\}\right|

  exactly, up to `EXACT_PAIRS` pairs; of more, `DRAWS` signs are drawn, with
  seed 0, and the ones observed are counted among them. The smallest p of n
  pairs is `smallest(n)`.

  Examples:
    >>> sign_flip([1.0, 2.0, 3.0])
    0.25

  References:
    Fisher, The Design of Experiments, 1935, section 21.
  """
  found = _scaled(values)
  if len(found) < 2:  # SciPy refuses a single pair, whose two signs are equal
    return 1.0 if len(found) else None
  return float(
    stats.permutation_test(
      (found,),
      # SciPy's own margin is of the observed mean, which may be 0.
      lambda x, axis: np.round(np.abs(np.mean(x, axis)), _DIGITS),
      permutation_type="samples",
      alternative="greater",
      n_resamples=DRAWS,
      batch=_BATCH,
      rng=np.random.default_rng(0),
    ).pvalue
  )


def wilcoxon(values: Sequence[float]) -> float | None:
  """p of Wilcoxon's signed-rank test, two-sided, exact with ties too.

  Differences of 0 are left out, and equal ones have the mean of their ranks;
  None if no difference is left. With ties, of more than `EXACT_PAIRS` pairs,
  signs are drawn as in `sign_flip`.

  Examples:
    >>> wilcoxon([1.0, -2.0, 3.0, 4.0, 5.0])
    0.1875

  References:
    Wilcoxon, Individual comparisons by ranking methods, 1945.
  """
  # Rounded, what comes of other sums of the same numbers is a tie.
  found = np.round(_scaled(values), _DIGITS)
  found = found[found != 0]
  ranks = stats.rankdata(np.abs(found))
  if len(set(ranks)) < len(ranks):
    # SciPy's own takes seconds where there are ties, or approximates.
    return sign_flip(np.sign(found) * ranks)
  if not len(found):
    return None
  test: Any = stats.wilcoxon  # its stub does not say what it returns
  return float(test(found, method="exact").pvalue)


def _scaled(values: Sequence[float]) -> np.ndarray:
  """The values over the largest of them, which no test here looks at."""
  found = np.asarray(values, np.float64)
  return found / (np.abs(found).max(initial=0) or 1)


def smallest(count: int) -> float:
  """The smallest two-sided p that so many pairs can have in `sign_flip`."""
  if count > EXACT_PAIRS:
    return 1 / (DRAWS + 1)
  return min(2.0 ** (1 - count), 1.0)


def holm(values: Sequence[float | None]) -> list[float | None]:
  """p-values corrected for how many there are; None stays, and counts not.

  Examples:
    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]

  References:
    Holm, A simple sequentially rejective multiple test procedure, 1979.
  """
  known = sorted(
    (value, at) for at, value in enumerate(values) if value is not None
  )
  found: list[float | None] = [None] * len(values)
  largest = 0.0
  for rank, (value, at) in enumerate(known):
    largest = max(largest, min(1.0, value * (len(known) - rank)))
    found[at] = largest
  return found


def recovered(
  start: Mapping[int, float],
  method: Mapping[int, float],
  reference: Mapping[int, float],
  target: Mapping[int, float],
) -> Share | None:
  r"""What share of the drop from a reference to a target a method has.

  .. math::
    \frac{\bar S_{start} - \bar S_{method}}
         {\bar S_{reference} - \bar S_{target}}

  with means over the seeds that all have. The interval is that of the
  percentile bootstrap over seeds, the values of a seed together, of
  `RESAMPLES` resamples with seed 0. A ratio whose denominator may be 0 has no
  interval: it is defined if the denominator's 95% t-interval is above 0.

  Args:
    start: sharpness by seed, that the method's drop is from; often that of the
      reference.
    method: likewise.
    reference: likewise.
    target: likewise.

  Returns:
    The share, or None if there is no seed that all have.
  """
  every = (start, method, reference, target)
  seeds = sorted(set.intersection(*map(set, every)))
  if not seeds:
    return None
  rows = [np.asarray([of[seed] for seed in seeds], np.float64) for of in every]
  first, own, above, below = rows
  denominator = mean(list(above - below))
  assert denominator is not None
  share = None
  if denominator.mean:
    share = float((first - own).mean()) / denominator.mean
  ends = denominator.interval
  if ends is None or ends[0] <= 0:
    return Share(share, None, False, len(seeds))

  def ratio(first, own, above, below, axis=-1):
    return (first - own).mean(axis) / (above - below).mean(axis)

  found = stats.bootstrap(
    rows,
    ratio,
    n_resamples=RESAMPLES,
    vectorized=True,
    paired=True,
    confidence_level=_LEVEL,
    method="percentile",
    rng=np.random.default_rng(0),
  ).confidence_interval
  return Share(share, (float(found.low), float(found.high)), True, len(seeds))
