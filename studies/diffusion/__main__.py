"""python -m studies.diffusion: runs what is unfinished, and reports."""

import argparse
import pathlib

from studies.diffusion import report
from studies.diffusion.runs import Settings, Study


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--report", action="store_true", help="run nothing")
  study = Study(pathlib.Path(__file__).parent, Settings())
  if not parser.parse_args().report:
    study.run()
  print(report.write(study))


if __name__ == "__main__":
  main()
