"""A TFDS builder for SuperGLUE's JSON lines that needs no TensorFlow.

TFDS's own builder uses TensorFlow types. This builder reads the same files:
each task has a zip with a folder of `train.jsonl`, `val.jsonl` and
`test.jsonl`. `test.jsonl` has no labels, and the builder does not read it.
"""

from collections.abc import Iterator, Mapping
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from .. import checked, options
from . import registry
from .task import Task


class SuperGlueJsonl(tfds.core.GeneratorBasedBuilder):
  """BoolQ, CB, COPA and WiC of SuperGLUE (Wang et al., 2019)."""

  VERSION = tfds.core.Version("2.0.0")
  BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own spelling)
    tfds.core.BuilderConfig(name=name.removeprefix("super_glue/"))
    for name in registry.names()
    if name.startswith("super_glue/")
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    task = self._task
    fields: dict[str, Any] = {
      name: tfds.features.Text() for name in task.fields
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description="One of SuperGLUE's tasks, with its labelled splits.",
      features=tfds.features.FeaturesDict(
        {
          "idx": np.int32,
          "label": tfds.features.ClassLabel(names=list(task.labels)),
          **fields,
        }
      ),
      homepage="https://super.gluebenchmark.com/",
      citation=_CITATION,
      disable_shuffling=True,  # stored by idx; training shuffles
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, Mapping[str, Any]]]]:
    assert self._task.source is not None
    ((file, url),) = self._task.source.originals
    folder = pathlib.Path(dl_manager.download_and_extract(url))
    folder /= pathlib.Path(file).stem
    return {
      "train": self._generate_examples(folder / "train.jsonl"),
      "validation": self._generate_examples(folder / "val.jsonl"),
    }

  def _generate_examples(
    self, path: pathlib.Path
  ) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
      for number, line in enumerate(lines, 1):
        row = self._parse(
          line, f"{path.parent.name}/{path.name}, line {number}"
        )
        yield row["idx"], row

  def _parse(self, line: str, where: str) -> dict[str, Any]:
    names = ("idx", "label", *self._task.fields)
    stored = checked.parse_json(line, f"{where},", dict)
    missing = [name for name in names if name not in stored]
    if missing:
      raise ValueError(
        f"{where} must be a JSON object with {', '.join(names)}; it lacks "
        f"{', '.join(missing)}."
      )
    row = {name: stored[name] for name in names}
    label = row["label"]
    if not isinstance(label, str):  # true, false, or the number of a choice
      in_range = isinstance(label, int) and (
        0 <= label < len(self._task.labels)
      )
      label = self._task.labels[label] if in_range else options.shown(label)
    if label not in self._task.labels:
      raise ValueError(
        f"{where} has the label {row['label']!r}; the labels are"
        f" {', '.join(self._task.labels)}."
      )
    return {**row, "label": label}

  @property
  def _task(self) -> Task:
    config = self.builder_config
    assert config is not None
    return registry.get(f"super_glue/{config.name}")


_CITATION = """\
@article{wang2019superglue,
  title={{SuperGLUE}: A Stickier Benchmark for General-Purpose Language
         Understanding Systems},
  author={Wang, Alex and Pruksachatkun, Yada and Nangia, Nikita and Singh,
          Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and
          Bowman, Samuel R},
  journal={arXiv preprint arXiv:1905.00537},
  year={2019}
}
"""
