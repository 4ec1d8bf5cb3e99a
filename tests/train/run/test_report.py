"""The report: its numbers are those of the results."""

import json
import re
import shutil

from outcomes import rows
import pytest

from train.run import report

KEYS = {
  *("command", "config", "metric", "best_step", "validation", "test"),
  *("baseline", "trained_parameters", "base_parameters", "steps"),
  "stopped_at",
  *("median_step_seconds", "median_tokens_per_second"),
  *("peak_host_memory_gib", "machine", "date"),
}


@pytest.fixture(scope="module")
def results(finished):
  return json.loads((finished / "results.json").read_text())


def test_results_have_their_keys(results):
  assert set(results) == KEYS
  for part in ("test", "baseline"):
    assert set(results[part]) == {
      *("accuracy", "loss", "rows", "unit", "accuracy_95")
    }
    low, high = results[part]["accuracy_95"]
    assert 0 <= low <= results[part]["accuracy"] <= high <= 1


def test_results_are_json_that_any_reader_takes(finished):
  def refuse(constant):
    raise AssertionError(constant)

  json.loads((finished / "results.json").read_text(), parse_constant=refuse)


def test_parameters_are_counted_without_the_auxiliary(results):
  # Rank 4 on four 16 x 16, a 16 x 32 and a 32 x 16; a head of 16 x 2 and 2.
  kept = 4 * (4 * (16 + 16) + 2 * (16 + 32)) + 16 * 2 + 2
  assert results["trained_parameters"] == kept
  assert results["base_parameters"] > kept


def test_the_report_has_the_numbers_of_the_results(finished, results):
  text = (finished / "report.md").read_text()
  for part in ("test", "baseline"):
    low, high = results[part]["accuracy_95"]
    cells = (
      f"| {results[part]['accuracy']:.4f} | {low:.4f} to {high:.4f} | "
      f"{results[part]['loss']:.4f} |"
    )
    assert cells in text
  for number in (
    f"step {results['best_step']}, the best",
    f"(accuracy {results['validation']:.4f})",
    f"{results['trained_parameters']:,} of {results['base_parameters']:,}",
    f"| steps | {results['steps']} |",
    f"{results['median_step_seconds']:.3f} s",
    f"{results['median_tokens_per_second']:,.0f} tokens/s",
    f"{results['peak_host_memory_gib']:.2f} GiB",
    results["machine"],
    results["date"],
    "python -m train",
    "without the auxiliary",
    "![curves](report.png)",
  ):
    assert number in text
  for name, value in results["config"].items():
    assert f"| {name} | {value} |" in text


def test_the_report_says_nothing_that_is_not_there(finished):
  text = (finished / "report.md").read_text()
  assert not re.search(r"\b(nan|None|inf)\b", text.split("| option |")[0])


def test_the_validation_is_the_best_that_was_logged(finished, results):
  logged = {
    row["step"]: row["validation_accuracy"]
    for row in rows(finished)
    if "validation_accuracy" in row
  }
  assert list(logged) == [4, 8, 12, 16, 20, 24]
  assert results["validation"] == max(logged.values())
  # The first of equals.
  assert results["best_step"] == max(logged, key=logged.__getitem__)


def test_the_figure_is_a_whole_png(finished):
  data = (finished / "report.png").read_bytes()
  assert data.startswith(b"\x89PNG\r\n") and data.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("metric", ["accuracy", "matthews_correlation"])
@pytest.mark.parametrize("baseline", [True, False])
def test_every_kind_of_results_can_be_reported(
  tmp_path, results, metric, baseline
):
  test = results["test"] | {"matthews_correlation": 0.1234}
  found = results | {
    "metric": metric,
    "test": test,
    "baseline": test if baseline else None,
  }
  (tmp_path / "results.json").write_text(json.dumps(found))
  report.write(tmp_path)
  assert (tmp_path / "report.md").read_text().count("0.1234") == 1 + baseline
  summary = report.summary(found, tmp_path)
  assert ("logistic regression" in summary) is baseline
  assert ("0.1234" in summary) is (metric != "accuracy")
  assert f"{test['accuracy']:.4f}" in summary
  assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_folder_without_results_has_none(tmp_path):
  assert report.results(tmp_path) is None


def test_a_finished_run_that_was_damaged_is_a_sentence(
  finished, run, tmp_path, capsys
):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  whole = {
    name: (folder / name).read_bytes()
    for name in ("results.json", "metrics.jsonl")
  }
  for name, content, told in (
    ("results.json", b"[]", "results.json must hold an object"),
    ("results.json", b'{"metric": 3}', "results.json lacks config"),
    ("metrics.jsonl", b"\xff\n", "metrics.jsonl, line 1, is not JSON in UTF-8"),
    ("metrics.jsonl", b'{"loss": 1}\n', "metrics.jsonl lacks step"),
  ):
    (folder / name).write_bytes(content)
    capsys.readouterr()
    assert run(folder) == 2
    assert told in capsys.readouterr().err
    assert (folder / name).read_bytes() == content
    (folder / name).write_bytes(whole[name])
  assert run(folder) == 0
