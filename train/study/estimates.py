"""Means over seeds, their intervals, and exact tests of paired differences."""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

DRAWS = 100_000
"""How many draws of signs a test makes if there are more possible signs."""
EXACT_PAIRS = int(math.log2(DRAWS))
"""Up to so many pairs, a test goes through all signs."""
RESAMPLES = 10_000
"""How many resamples of seeds a bootstrap makes."""

_LEVEL = 0.95
# The signs of so many resamples are in memory at once.
_BATCH = 10_000
# Sums of the same numbers in different orders differ only by rounding.
_DIGITS = 9


class Estimate(NamedTuple):
  """A mean over seeds.

  Attributes:
    mean: the mean.
    half: half of the 95% t-interval's width; None for a single seed.
    seeds: the number of seeds.
  """

  mean: float
  half: float | None
  seeds: int

  @property
  def interval(self) -> tuple[float, float] | None:
    """The ends of the interval; None for a single seed."""
    if self.half is None:
      return None
    return self.mean - self.half, self.mean + self.half


class Share(NamedTuple):
  """A recovered share; see `recovered`.

  Attributes:
    share: the ratio of means; None if the denominator is 0.
    interval: the 95% interval of the bootstrap; None if it is not defined.
    defined: whether the denominator's 95% t-interval is above 0.
    seeds: the number of seeds.
  """

  share: float | None
  interval: tuple[float, float] | None
  defined: bool
  seeds: int


def mean(values: Sequence[float]) -> Estimate | None:
  r"""Returns the mean of independent values with its t-interval.

  Returns None if there are no values. The interval is

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
  """Returns `left - right` for each seed that both have, sorted by seed."""
  return [left[seed] - right[seed] for seed in sorted(set(left) & set(right))]


def sign_flip(values: Sequence[float]) -> float | None:
  r"""Returns the two-sided p-value of the sign-flip test; None for no pair.

  The null hypothesis is that the mean of the paired differences is 0. If the
  two members of each pair are exchangeable, all signs are equally likely:

  .. math::
    p = 2^{-n} \left|\left\{\epsilon \in \{-1, 1\}^n : \left|\sum_i
    \epsilon_i d_i\right| \ge \left|\sum_i d_i\right|\right\}\right|

  This is exact up to `EXACT_PAIRS` pairs. For more pairs, `DRAWS` signs are
  drawn with seed 0, and the observed signs are counted among them. The smallest
  p of n pairs is `smallest(n)`.

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
      # SciPy's own tolerance is relative to the observed mean, which may be 0.
      lambda x, axis: np.round(np.abs(np.mean(x, axis)), _DIGITS),
      permutation_type="samples",
      alternative="greater",
      n_resamples=DRAWS,
      batch=_BATCH,
      rng=np.random.default_rng(0),
    ).pvalue
  )


def wilcoxon(values: Sequence[float]) -> float | None:
  """Returns the two-sided p-value of Wilcoxon's signed-rank test.

  Differences of 0 are left out, and equal differences get the mean of their
  ranks. The result is None if no difference is left. The test is exact, also
  with ties. Only with ties and more than `EXACT_PAIRS` pairs, signs are drawn
  as in `sign_flip`.

  Examples:
    >>> wilcoxon([1.0, -2.0, 3.0, 4.0, 5.0])
    0.1875

  References:
    Wilcoxon, Individual comparisons by ranking methods, 1945.
  """
  # Rounding makes ties of values that are sums of the same numbers.
  found = np.round(_scaled(values), _DIGITS)
  found = found[found != 0]
  ranks = stats.rankdata(np.abs(found))
  if len(set(ranks)) < len(ranks):
    # With ties, SciPy's own test takes seconds or approximates.
    return sign_flip(np.sign(found) * ranks)
  if not len(found):
    return None
  test: Any = stats.wilcoxon  # its stub lacks the type of the result
  return float(test(found, method="exact").pvalue)


def _scaled(values: Sequence[float]) -> np.ndarray:
  """Returns the values divided by the largest; the tests ignore the scale."""
  found = np.asarray(values, np.float64)
  return found / (np.abs(found).max(initial=0) or 1)


def smallest(count: int) -> float:
  """Returns the smallest p that `sign_flip` can give for `count` pairs."""
  if count > EXACT_PAIRS:
    return 1 / (DRAWS + 1)
  return min(2.0 ** (1 - count), 1.0)


def holm(values: Sequence[float | None]) -> list[float | None]:
  """Returns p-values after Holm's correction; None stays and does not count.

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
  r"""Returns a method's share of the drop from a reference to a target.

  .. math::
    \frac{\bar S_{start} - \bar S_{method}}
         {\bar S_{reference} - \bar S_{target}}

  The means are over the seeds that all four have. The interval is a percentile
  bootstrap over seeds, with `RESAMPLES` resamples and seed 0; the values of a
  seed stay together. There is an interval only if the denominator's 95%
  t-interval is above 0, because the denominator may be 0 otherwise.

  Args:
    start: the sharpness, by seed, from which the method's drop is measured;
      often the same as `reference`.
    method: the sharpness of the method, by seed.
    reference: the sharpness of the reference, by seed.
    target: the sharpness of the target, by seed.

  Returns:
    The share, or None if no seed is in all four.
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
