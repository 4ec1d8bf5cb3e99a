"""Makes the README's table of test accuracies.

  python benchmarks/accuracy.py

Runs `python -m train` for each method and seed. All methods of a seed get the
same rows in the same order. Finished runs are not repeated.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--methods", nargs="+", default=["lora", "bilora"])
  parser.add_argument("--runs", type=pathlib.Path, default="runs/accuracy")
  parser.add_argument("--out", type=pathlib.Path)
  options = parser.parse_args()

  found: dict[str, list[dict]] = {}
  for seed in range(options.seeds):
    for method in options.methods:
      folder = options.runs / f"{method}-seed{seed}"
      subprocess.run(
        [sys.executable, "-m", "train", "--preset", "snippets"]
        + ["--method", method, "--seed", str(seed)]
        # The baseline's features are frozen, so all methods of a seed share
        # one baseline.
        + (["--no-baseline"] if method != options.methods[0] else [])
        + ["--run-dir", str(folder)],
        check=True,
      )
      results = json.loads((folder / "results.json").read_text())
      found.setdefault(method, []).append(results)
  rows = {
    method: [run["test"]["accuracy"] for run in runs]
    for method, runs in found.items()
  }
  first = found[options.methods[0]]
  rows["logistic regression on frozen features"] = [
    run["baseline"]["accuracy"] for run in first
  ]
  seeds = " | ".join(f"seed {seed}" for seed in range(options.seeds))
  print(f"| test accuracy | {seeds} | mean |")
  print("|---|" + "---|" * (options.seeds + 1))
  for name, values in rows.items():
    cells = " | ".join(f"{value:.4f}" for value in values)
    print(f"| {name} | {cells} | {statistics.fmean(values):.4f} |")
  if options.out:
    report = {
      "command": f"python benchmarks/accuracy.py --seeds {options.seeds}",
      "machine": first[0]["machine"],
      "date": time.strftime("%Y-%m-%d"),
      "test_rows": first[0]["test"]["rows"],
      "test_accuracy": rows,
      "validation_accuracy": {
        method: [run["validation"] for run in runs]
        for method, runs in found.items()
      },
      "test_loss": {
        method: [run["test"]["loss"] for run in runs]
        for method, runs in found.items()
      },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  main()
