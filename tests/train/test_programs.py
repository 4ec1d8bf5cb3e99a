"""The tests' own cache of what runs of one configuration compute."""

import numpy as np
import programs

from train.data import scores
from train.run import assemble
from train.run import config as config_lib


def test_runs_of_one_configuration_have_one_method(
  tiny_config, tmp_path, monkeypatch
):
  programs.share(monkeypatch)
  one, same, other = (
    assemble.prepare(
      config_lib.replace(tiny_config, run_dir=str(tmp_path / name), **fields)
    )
    for name, fields in {"one": {}, "same": {}, "other": {"rank": 2}}.items()
  )
  assert one.method is same.method
  assert one.method is not other.method


def test_a_baseline_is_of_its_features_own_numbers(monkeypatch):
  programs.share(monkeypatch)
  labels = np.array([0, 1] * 4)
  right = labels[:, None] + np.zeros((8, 2), np.float32)

  def accuracy(features):
    split = features, labels
    return scores.linear(split, split, split, ["accuracy"]).metrics["accuracy"]

  assert [accuracy(x) for x in (right, np.zeros_like(right), right)] == [
    *(1.0, 0.5, 1.0)
  ]
