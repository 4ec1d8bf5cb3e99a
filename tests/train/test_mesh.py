"""Runs on meshes end where the run on one device ends."""

import numpy as np
from outcomes import adapters, rows
import pytest

# Sums are taken in another order on each mesh, to float32's rounding. Adam
# divides by sqrt(v) + 1e-8: an entry whose gradient is rounding only would
# still move by the learning rate.
TOLERANCE = 1e-5

MESHES = [
  "data=8",
  "fsdp=8",
  "data=2,tensor=4",
  "data=2,fsdp=2,tensor=2",
]


def assert_near(left, right):
  ours, theirs = adapters(left), adapters(right)
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_allclose(
      ours[name], theirs[name], rtol=0, atol=TOLERANCE, err_msg=name
    )
  for ours, theirs in zip(rows(left), rows(right), strict=True):
    assert ours["step"] == theirs["step"]
    for name in ("loss", "validation_loss"):
      assert ours.get(name) == pytest.approx(theirs.get(name), abs=TOLERANCE)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_on_a_mesh_ends_where_that_on_one_device_does(
  run, finished, tmp_path, mesh
):
  assert run(tmp_path / "run", "--mesh", mesh) == 0
  assert_near(tmp_path / "run", finished)
