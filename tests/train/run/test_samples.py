"""Answers that are generated at each validation."""

import json

import outcomes
import pytest

from train import __main__ as program


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, tiny_decoder):
  """The folder of a run on conversations that samples two prompts."""
  folder = tmp_path_factory.mktemp("sampled")
  data = [
    {"prompt": f"Count to {n}.", "response": " ".join(map(str, range(1, n)))}
    for n in range(2, 122)
  ]
  (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, data)) + "\n")
  command = [
    *("--task", "instructions", "--data", str(folder / "rows.jsonl")),
    *("--model", str(tiny_decoder), "--max-length", "48", "--batch-size", "4"),
    *("--rank", "2", "--auxiliary-rank", "2", "--learning-rate", "0.01"),
    *("--epochs", "1", "--no-compilation-cache", "--samples", "2"),
    *("--run-dir", str(folder / "run")),
  ]
  assert outcomes.main(command) == 0
  return folder / "run"


def test_samples_are_of_each_validation_and_the_first_prompts(sampled):
  found = [
    json.loads(line)
    for line in (sampled / "samples.jsonl").read_text().splitlines()
  ]
  metrics = [
    json.loads(line)
    for line in (sampled / "metrics.jsonl").read_text().splitlines()
  ]
  validated = [row["step"] for row in metrics if "validation_loss" in row]
  assert [row["step"] for row in found] == [x for x in validated for _ in "12"]
  assert len({row["prompt"] for row in found}) == 2
  assert all("Count to" in row["prompt"] for row in found)


def test_a_sample_is_what_the_run_generates_at_its_end(sampled, capsys):
  best = json.loads((sampled / "results.json").read_text())["best_step"]
  lines = (sampled / "samples.jsonl").read_text().splitlines()
  row = next(x for x in map(json.loads, lines) if x["step"] == best)
  prompt = next(x for x in row["prompt"].splitlines() if "Count" in x)
  prompt = prompt[prompt.index("Count") : prompt.index(".") + 1]
  capsys.readouterr()
  generate = ["generate", "--run", str(sampled), "--prompt", prompt]
  assert program.main([*generate, "--max-new-tokens", "64"]) == 0
  assert row["answer"].strip() in capsys.readouterr().out


def test_samples_of_labels_are_refused_before_any_work(run, tmp_path, capsys):
  assert run(tmp_path / "run", "--samples", "2") == 2
  shown = capsys.readouterr().err
  assert "--samples is only for conversations" in shown
  assert "got --task snippets" in shown
  assert not (tmp_path / "run").exists()
