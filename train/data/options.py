"""The options of data: what is learned from, and how rows become batches."""

import dataclasses
import difflib
from typing import Literal

from ..errors import UsageError
from ..options import option, spelt
from . import registry

OnLong = Literal["cut", "skip", "error"]
NoiseKind = Literal["symmetric", "class-dependent"]

# The tasks of what --data names.
INSTRUCTIONS = "instructions"
_COLUMNS = ("classification", "regression")


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """What is learned from."""

  task: str = "snippets"
  """The data set. Texts: snippets; rated-sentences, or one of its domains,
  rated-sentences/{movies,products,tweets}; glue/{cola,sst2,mrpc,qnli,mnli,rte};
  super_glue/{boolq,cb,copa,wic}. Decoders and T5s answer these tasks in words.
  Images: digits. For your own --data: classification, regression, or
  instructions, from which a decoder learns to respond."""
  path: str = option("", flag="data")
  """Your own rows: a .csv, .tsv or .jsonl file (also with .gz), a .parquet
  file, a folder of images (CLASS/*.png, train/CLASS/*.png, or MNIST's IDX
  files), a folder that Hugging Face datasets saved, or tfds:NAME."""
  text: str = ""
  """Column with the text, or several columns separated by commas, such as
  title,body. Empty means a column named text, sentence, review or similar."""
  text_pair: str = ""
  """Column with the second text of a pair. Empty means the second column of a
  known pair, such as sentence1 and sentence2, or premise and hypothesis."""
  label: str = ""
  """Column with the label. Empty means a column named label, class, target or
  similar."""
  validation: str = ""
  """Rows for validation, in any format of --data. Empty means the validation
  split of --data, or held-out rows of --data if it has no such split."""
  test: str = ""
  """Rows for the test, in any format of --data. Empty means the test split of
  --data, or held-out rows of --data if it has no such split."""
  held_out: float = option(0.0, least=0, below=0.45)
  """Share of the rows of --data that is held out for validation, and the same
  share again for the test. 0 means 0.1. For instructions 0 means 0.02, or 0.1
  if a split would have no rows."""
  data_dir: str = ""
  """Folder where prepared data sets are kept. Empty means the user's cache
  folder."""
  train_rows: int = option(0, least=0)
  """Number of training rows, which the seed draws. 0 means all rows."""
  eval_rows: int = option(0, least=0)
  """Number of rows for validation, and the same number for the test. 0 means
  all rows."""
  label_noise: float = option(0.0, least=0, below=1)
  """Share of the training labels that are replaced by wrong labels. The seed
  draws these rows. The test set keeps its labels (for classification)."""
  label_noise_kind: NoiseKind = "symmetric"
  """Which labels become wrong. symmetric: labels of all classes, and each
  becomes any other label. class-dependent: labels of the classes 1, 3, 5, ...,
  and each becomes the class before it."""
  one_rater: bool = False
  """Train on the label that one rater gave to a row, in place of the label that
  follows from the mean of all raters. The seed draws the rater. The test set
  keeps the labels from the mean (for rated-sentences)."""
  noisy_validation: bool = False
  """Change the labels of the validation rows by --label-noise and --one-rater,
  too. Without this option only training labels are changed."""
  imbalance: float = option(0.0, least=0, below=1)
  """Ratio of the training rows of the rarest class to those of the most
  frequent class. The sizes of the classes between them fall exponentially. 0
  keeps the classes as they are (for classification)."""
  max_length: int = option(256, least=3, below=2**21)
  """Largest number of tokens in an example. Longer examples are cut."""
  image_size: int = option(0, least=0, below=2**13)
  """Images are resized to a square with sides of this many pixels. 0 means the
  size in the model's preprocessor_config.json, or else the size at which the
  model learned its positions, which is at most 224 for an ONNX file (for images
  in --data)."""
  pack: bool = True
  """Put several conversations into one row of --max-length tokens (for
  instructions)."""
  on_long: OnLong = "cut"
  """What to do with a conversation of more than --max-length tokens: cut its
  end, skip the conversation, or stop with an error. cut also skips a
  conversation whose prompt alone is too long. Skipped conversations are counted
  (for instructions)."""
  group_by_length: int = option(0, least=0)
  """Sort shuffled rows by length within groups of this many batches, before the
  rows are cut into batches. Then batches have less padding, but are less
  random. 0 means no sorting."""
  chat_template: str = ""
  """File with a chat template, in Jinja. Empty means the model's own template
  (for instructions)."""

  def limit(self, split: str) -> int:
    """The most rows of a split; 0: all."""
    return self.train_rows if split == "train" else self.eval_rows


def check(options: DataOptions) -> None:
  """Refuses options that do not go together, before any work starts.

  Raises:
    UsageError: that names the option, what came and what is allowed.
  """
  if options.task not in (tasks := registry.names()):
    near = difflib.get_close_matches(options.task, tasks, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(
      f"There is no task {options.task!r}; the tasks are {', '.join(tasks)}."
      + hint
    )
  needs = options.task in (*_COLUMNS, INSTRUCTIONS)
  if needs is not bool(options.path):
    raise UsageError(
      "--data gives the rows of --task classification, regression or "
      "instructions; these tasks need it, and no other task takes it; got "
      f"{options.path!r} with --task {options.task}."
    )
  _check_regime(options)
  allowed = {
    ("text", "text_pair", "label"): _COLUMNS,
    ("validation", "test", "held_out"): (*_COLUMNS, INSTRUCTIONS),
    ("image_size",): _COLUMNS,
    ("chat_template",): (INSTRUCTIONS,),
  }
  for names, takers in allowed.items():
    for name in names:
      if getattr(options, name) and options.task not in takers:
        raise UsageError(
          f"{spelt(name)} is only for --task {' or '.join(takers)}; got it "
          f"with --task {options.task}."
        )
  if options.text_pair and not options.text:
    raise UsageError(
      "--text-pair is the second text of a pair and needs --text, the first; "
      f"got --text-pair {options.text_pair} alone."
    )
  if options.held_out and options.validation and options.test:
    raise UsageError(
      "--held-out has no use if both --validation and --test are given; got "
      "all three."
    )


def _check_regime(options: DataOptions) -> None:
  task = registry.get(options.task)
  for name in ("label_noise", "imbalance"):
    value = getattr(options, name)
    if value and task.kind != "classification":
      raise UsageError(
        f"{spelt(name)} is only for classification; got {value:g} with --task "
        f"{task.name}, which is for {task.kind}."
      )
  if options.one_rater and not task.votes:
    able = [x for x in registry.names() if registry.get(x).votes]
    raise UsageError(
      f"--one-rater is only for --task {' or '.join(able)}, whose rows have "
      f"several raters; got it with --task {task.name}."
    )
  if options.noisy_validation and not (
    options.label_noise or options.one_rater
  ):
    raise UsageError(
      "--noisy-validation needs --label-noise or --one-rater; got neither."
    )
