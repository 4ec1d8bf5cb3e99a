"""Statistics against other means to the same numbers."""

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from train.study import estimates


def test_the_interval_is_scipy_s():
  values = [0.81, 0.84, 0.80, 0.86, 0.83]
  found = estimates.mean(values)
  assert found is not None and found.interval is not None
  wanted = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
  np.testing.assert_allclose(found.interval, wanted, rtol=1e-12)
  assert estimates.mean([0.5]) == (0.5, None, 1)
  assert estimates.mean([]) is None


def test_pairs_are_of_the_seeds_that_both_have():
  left, right = {3: 1.0, 1: 5.0, 0: 2.0}, {0: 0.5, 1: 1.0, 2: 9.0}
  assert estimates.differences(left, right) == [1.5, 4.0]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_sign_flip_goes_through_all_signs(count):
  # Of tenths, with ties and a zero among them.
  values = np.random.default_rng(count).integers(-3, 5, count) / 10
  more = [
    abs(sum(sign * round(10 * x) for sign, x in zip(signs, values)))
    >= abs(sum(round(10 * x) for x in values))
    for signs in itertools.product((-1, 1), repeat=count)
  ]
  assert estimates.sign_flip(list(values)) == np.mean(more)


def test_sums_that_differ_by_rounding_are_equal():
  # In floating point neither 0.1 + 0.2 - 0.3 nor its tripled parts are 0.
  assert estimates.sign_flip([0.1, 0.2, -0.3]) == 1
  assert estimates.sign_flip([0.3e-9, 0.6e-9, -0.9e-9]) == 1


def test_the_smallest_p_is_that_of_equal_signs():
  for count in (1, 2, 5, 10):
    same = estimates.sign_flip([0.1 * (i + 1) for i in range(count)])
    assert same == estimates.smallest(count) == 2.0 ** (1 - count)


def test_many_pairs_are_drawn_near_the_exact_p(monkeypatch):
  values = list(np.random.default_rng(1).normal(0.3, 1, 17))
  assert len(values) > estimates.EXACT_PAIRS
  found = estimates.sign_flip(values)
  assert found == estimates.sign_flip(values)
  monkeypatch.setattr(estimates, "DRAWS", 2**17)
  exact = estimates.sign_flip(values)
  assert exact is not None and 0.01 < exact < 0.99
  # Of 100,000 draws: 5 standard deviations.
  assert found != exact and found == pytest.approx(exact, abs=0.008)


def test_wilcoxon_is_scipy_s_permutation_without_ties_and_with():
  # SciPy's stubs know no method but by its name.
  reference: Any = stats.wilcoxon
  plain = list(np.random.default_rng(2).normal(0.3, 1, 9))
  # As many as all signs of nine, or more: exact.
  every = stats.PermutationMethod(n_resamples=2**9)
  wanted = reference(plain, method=every).pvalue
  assert estimates.wilcoxon(plain) == pytest.approx(wanted, rel=1e-12)
  tied = [0.1, 0.1, -0.2, 0.2, 0.3, 0.3 + 1e-16, 0.0, -0.1]
  wanted = reference(np.round(tied, 10), method=every).pvalue
  assert estimates.wilcoxon(tied) == pytest.approx(wanted, rel=1e-12)
  assert estimates.wilcoxon([0.0, 0.0]) is None


def test_holm_by_hand():
  found = estimates.holm([0.04, 0.001, None, 0.03, 0.6, 0.03])
  assert found == pytest.approx([0.12, 0.005, None, 0.12, 0.6, 0.12])
  assert estimates.holm([0.5, 0.9]) == [1.0, 1.0]


def test_a_share_is_a_ratio_of_means_of_the_seeds_that_all_have():
  reference = {0: 4.0, 1: 5.0, 2: 6.0, 7: 99.0}
  target = {0: 1.0, 1: 2.2, 2: 2.8}
  method = {0: 2.0, 1: 4.0, 2: 4.5, 9: 99.0}
  found = estimates.recovered(reference, method, reference, target)
  assert found is not None and found.defined and found.seeds == 3
  assert found.share == pytest.approx(4.5 / 9.0)
  # The bootstrap's distribution itself: all 27 resamples of the seeds.
  ratios = [
    sum(reference[i] - method[i] for i in seeds)
    / sum(reference[i] - target[i] for i in seeds)
    for seeds in itertools.product(range(3), repeat=3)
  ]
  low, high = np.quantile(ratios, (0.025, 0.975), method="inverted_cdf")
  assert found.interval == pytest.approx((low, high), abs=0.02)
  ends = [
    estimates.recovered(reference, x, reference, target)
    for x in (reference, target)
  ]
  assert [x.share for x in ends if x] == [0, 1]
  # Half of the drop, though all of it happens elsewhere.
  moved = [{seed: x[seed] + 5 for seed in x} for x in (reference, method)]
  elsewhere = estimates.recovered(*moved, reference, target)
  assert elsewhere is not None
  assert elsewhere.share == pytest.approx(found.share)
  assert elsewhere.interval == pytest.approx(found.interval)


def test_a_share_of_nothing_has_no_interval():
  reference, method = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.5, 1: 1.5, 2: 2.5}

  def share(target):
    return estimates.recovered(reference, method, reference, target)

  found = share({0: 2.0, 1: 1.0, 2: 2.9})
  assert found is not None and not found.defined and found.interval is None
  assert found.share == pytest.approx(0.5 / 0.1)
  # A target that is surely sharper is no target either.
  worse = {0: 2.0, 1: 3.01, 2: 4.0}
  found = share(worse)
  assert found is not None and not found.defined
  equal = share(reference)
  assert equal == (None, None, False, 3)
  assert share({5: 1.0}) is None
