"""The candidates' cosines are those of dense linear algebra."""

import jax
import numpy as np
import pytest

from studies import candidates

_SHAPES = {"first": (6, 9), "second": (7, 5)}


def _kernels(seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in _SHAPES.items()
  }


def _cosine(x, y) -> float:
  x, y = (np.concatenate([z[k].ravel() for k in _SHAPES]) for z in (x, y))
  return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.fixture(scope="module")
def found():
  now, other = _kernels(0), [_kernels(seed) for seed in (1, 2)]
  cosines = candidates._cosines(
    jax.random.key(0),
    now,
    [_kernels(3), _kernels(4)],
    other,
    {0.5: _kernels(5)},
    {k: np.linalg.qr(x[:, :2])[0] for k, x in _kernels(6).items()},
    {k: np.abs(x) for k, x in _kernels(7).items()},
  )
  return {name: float(value) for name, value in cosines.items()}


def test_the_best_of_a_rank_is_that_of_the_singular_values(found):
  squares = [np.linalg.svd(x)[1] ** 2 for x in _kernels(0).values()]
  for rank in (1, 2, 4):
    share = sum(x[:rank].sum() for x in squares) / sum(x.sum() for x in squares)
    assert found[f"same batch, best of rank {rank}"] == pytest.approx(
      share**0.5, abs=1e-5
    )
  assert found["same batch, best of rank 8"] == pytest.approx(1, abs=1e-5)
  name = "same batch, from two random sketches of rank 32, core 16"
  assert found[name] == pytest.approx(1, abs=1e-3)


def test_the_others_are_dense_cosines(found):
  now, sizes = _kernels(0), _kernels(7)
  assert found["same batch, scaled by the weights (ASAM)"] == pytest.approx(
    _cosine({k: sizes[k] ** 2 * now[k] for k in now}, now), abs=1e-5
  )
  balls = {k: x / np.linalg.norm(x) for k, x in now.items()}
  assert found["same batch, a ball for each layer"] == pytest.approx(
    _cosine(balls, now), abs=1e-5
  )
  bases = {k: np.linalg.qr(x[:, :2])[0] for k, x in _kernels(6).items()}
  onto = {k: bases[k] @ (bases[k].T @ now[k]) for k in now}
  name = "same batch, onto the inputs of the primary's a"
  assert found[name] == pytest.approx(_cosine(onto, now), abs=1e-5)
  mean = {k: (_kernels(1)[k] + _kernels(2)[k]) / 2 for k in now}
  assert found["the mean of 2 other batches"] == pytest.approx(
    _cosine(mean, now), abs=1e-5
  )
  name = "the other half of the batch, for a half"
  assert found[name] == pytest.approx(
    _cosine(_kernels(4), _kernels(3)), abs=1e-5
  )


def test_the_report_has_means_and_ranges():
  rows = [
    {"seed": seed, "step": 0, "loss": 0.5, "cosines": {"one": x, "two": -x}}
    for seed, x in enumerate((0.25, 0.75))
  ]
  page = candidates.report(rows)
  assert "2 points, of 2 run(s) of 3" in page
  assert "| one | 0.50 | 0.25 | 0.75 |" in page
  assert "| two | -0.50 | -0.75 | -0.25 |" in page


def test_a_batch_comes_with_those_after_it():
  ahead = candidates._ahead(iter(range(10)), 2)
  assert [next(ahead) for _ in range(2)] == [(0, [1, 2]), (1, [2, 3])]
