"""What an editable installation imports by the wheel's name: `train/`."""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[2] / "train")]
