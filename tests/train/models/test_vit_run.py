"""Runs of the program on images."""

import json

import outcomes
import pytest
import vit_cases

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
  folder = tmp_path_factory.mktemp("onnx")
  return vit_cases.write(folder / "tiny.onnx", vit_cases.tensors("backbone."))


@pytest.fixture(scope="module")
def run(tiny_vit):
  def run_here(folder, *more):
    return outcomes.main(
      [
        *("--task", "digits", "--model", str(tiny_vit)),
        *("--train-rows", "60", "--eval-rows", "40", "--batch-size", "20"),
        *("--method", "lora", "--epochs", "30", "--learning-rate", "0.005"),
        *("--log-every", "15"),
        *("--eval-every", "90", "--checkpoint-every", "90"),
        *("--no-compilation-cache", "--run-dir", str(folder), *more),
      ]
    )

  return run_here


def test_digits_are_learned_and_compared_with_the_frozen_features(
  tmp_path, run
):
  folder = tmp_path / "run"
  assert run(folder) == 0
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
  assert len(losses) == 6
  assert losses[-1] < 0.5 * losses[0]
  results = json.loads((folder / "results.json").read_text())
  assert results["test"]["rows"] == results["baseline"]["rows"] == 40
  assert results["baseline"]["accuracy"] > 0.2  # of ten classes


def test_texts_and_images_are_not_taken_for_each_other(
  tmp_path, run, tiny_model, data_dir, capsys
):
  assert run(tmp_path / "a", "--model", str(tiny_model)) == 2
  assert "--task digits has images" in capsys.readouterr().err
  options = ("--task", "snippets", "--data-dir", str(data_dir))
  assert run(tmp_path / "b", *options) == 2
  assert "tiny.onnx is a ViT, which reads images" in capsys.readouterr().err
