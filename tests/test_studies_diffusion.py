"""The study of diffusion: its loss, its noise, its rows and its report."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from studies.diffusion import denoising, report, runs

_FOLDER = pathlib.Path(runs.__file__).parent
_TINY = runs.Settings(
  width=8,
  depth=1,
  heads=2,
  base_steps=2,
  base_batch=4,
  images=3,
  batch=2,
  steps=4,
  every=2,
  draws=1,
  samples=10,
  sampling_steps=2,
  learning_rates=(1e-3, 2e-3),
  rhos=(0.01,),
  tuning_seeds=(100,),
  seeds=(0, 1),
)


def test_the_schedule_is_the_cosine_until_beta_is_cut():
  found = denoising.signals()
  angles = (np.arange(1, denoising.TIMES + 1) / denoising.TIMES + 0.008) / 1.008
  cosine = np.cos(angles * np.pi / 2) ** 2
  cosine /= np.cos(0.008 / 1.008 * np.pi / 2) ** 2
  np.testing.assert_allclose(found[:-1], cosine[:-1], rtol=1e-5)
  # The cosine ends at 0, and a beta of 0.999 leaves a thousandth.
  np.testing.assert_allclose(found[-1], found[-2] / 1000, rtol=1e-3)


def test_the_loss_is_a_transcription_in_numpy():
  data = denoising.digits()
  batch = denoising.fixed(data.test, np.full(len(data.test), 9), 2)

  def predict(images, times, labels):
    return images * (times / denoising.TIMES)[:, None, None] + labels[0]

  total = 0.0
  for image, label, time, noise in zip(*map(np.float64, batch)):
    signal = np.float64(denoising.signals()[int(time)])
    noised = np.sqrt(signal) * image + np.sqrt(1 - signal) * noise
    predicted = noised * time / denoising.TIMES + label
    total += np.mean((predicted - noise) ** 2)
  np.testing.assert_allclose(
    denoising.denoising_loss(predict, batch),
    total / len(batch.images),
    rtol=1e-5,
  )


def test_sampling_with_the_true_noise_gives_the_image():
  image = jnp.asarray(denoising.digits().test[0])

  def predict(images, times, labels):
    signal = jnp.asarray(denoising.signals())[times][:, None, None]
    return (images - jnp.sqrt(signal) * image) / jnp.sqrt(1 - signal)

  noise = np.random.default_rng(0).standard_normal((2, 8, 8))
  found = denoising.sampled(predict, jnp.asarray(noise), jnp.zeros(2), 5)
  # At the first time the signal is a millionth of a thousandth.
  np.testing.assert_allclose(found, np.stack([image] * 2), atol=1e-3)


def test_no_image_is_in_two_parts_of_the_data():
  data = denoising.digits()
  parts = data.old, data.held_out, data.pool, data.validation, data.test
  assert sum(map(len, parts)) == 1797
  assert len(np.unique(np.concatenate(parts), axis=0)) == 1797
  assert not {*data.old_labels, *data.held_out_labels} - set(range(9))


@pytest.fixture
def study(tmp_path, monkeypatch):
  """Tiny, with the reference alone."""
  monkeypatch.setattr(runs, "_CACHE", tmp_path / "cache")
  lora = {runs.REFERENCE: runs.Method()}
  monkeypatch.setattr(runs, "METHODS", lora)
  monkeypatch.setattr(report, "METHODS", lora)
  return runs.Study(tmp_path / "study", _TINY)


@pytest.mark.slow
def test_a_row_is_appended_and_is_not_repeated(study, monkeypatch):
  study.run()
  path = study.folder / "runs.jsonl"
  lines = path.read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  # The base, two points with one seed, and two final runs.
  assert len(rows) == len({row["key"] for row in rows}) == 5
  assert [len(row["curves"]["new"]) for row in rows[1:]] == [3] * 4
  assert np.shape(rows[3]["samples"]) == (10, 64) and "samples" not in rows[4]

  # A run that a kill has cut is done again, to the same numbers.
  path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
  again = runs.Study(study.folder, _TINY)
  again.run()
  assert len(path.read_text().splitlines()) == 5
  assert again.rows[rows[4]["key"]]["curves"] == rows[4]["curves"]

  monkeypatch.setattr(runs.Study, "_adaptation", None)
  runs.Study(study.folder, _TINY).run()  # nothing is left to run
  assert len(path.read_text().splitlines()) == 5
  page = report.write(again).read_text()
  assert "5 runs are finished." in page


def _row(stage, method, rate, rho, seed, losses, **others):
  point = {"learning_rate": rate, "rho": rho, **others}
  return {
    "key": runs.key_of(stage, method, point, seed),
    "settings": _TINY.digest,
    "stage": stage,
    "method": method,
    "point": point,
    "seed": seed,
    "curves": dict.fromkeys(("training", "new", "old"), losses),
    "share_of_nines": 0.5,
    "samples": np.zeros((10, 64), int).tolist(),
    "jax": "0",
    "date": "2026-01-01",
  }


def test_the_report_is_made_of_the_rows(tmp_path):
  rows = [
    _row("tuning", "LoRA r=4", 1e-3, 0.0, 100, [0.9, 0.5, 0.6]),
    # A run that breaks at the end has measurements before.
    _row("tuning", "LoRA r=4", 2e-3, 0.0, 100, [0.9, 0.4, None]),
    _row("final", "LoRA r=4", 2e-3, 0.0, 0, [0.9, 0.3, 0.8], steps=2),
    _row("final", "LoRA r=4", 2e-3, 0.0, 1, [0.9, 0.5, 0.8], steps=2),
    _row("tuning", "Bi-LoRA", 2e-3, 0.01, 100, [0.9, 0.4, 0.3]),
    _row("tuning", "Bi-LoRA", 1e-3, 0.01, 100, [0.9, 0.4, 0.4]),
    _row("final", "Bi-LoRA", 2e-3, 0.01, 0, [0.9, 0.7, 0.2], steps=4),
    _row("final", "Bi-LoRA", 2e-3, 0.01, 1, [0.9, 0.7, 0.4], steps=4),
  ]
  (tmp_path / "runs.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )
  study = runs.Study(tmp_path, _TINY)
  assert study.winner("Bi-LoRA") == {
    "learning_rate": 2e-3,
    "rho": 0.01,
    "steps": 4,
  }
  page = report.write(study).read_text()
  assert "| LoRA r=4 | 0.002 |  | 2 | 400.00 (won) |" in page
  # Two equal differences of -0.1, of which the smallest p is a half.
  assert (
    "| Bi-LoRA | 2 | 300.00 ± 1270.62 | -100.00 ± 0.00 | 0.500 | 0.500 | "
    "0.002, 0.01 | 4 | 4 |"
  ) in page
  assert {path.stem for path in tmp_path.glob("*.svg")} == {
    *("curves", "differences", "samples")
  }


def test_the_committed_report_is_that_of_the_committed_rows(tmp_path):
  shutil.copy(_FOLDER / "runs.jsonl", tmp_path)
  page = report.write(runs.Study(tmp_path, runs.Settings())).read_text()
  assert page == (_FOLDER / "report.md").read_text()
