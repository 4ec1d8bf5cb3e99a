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
  """The data set: snippets, rated-sentences or one of its domains,
  rated-sentences/{movies,products,tweets}, glue/{cola,sst2,mrpc,qnli,mnli,rte}
  or super_glue/{boolq,cb,copa,wic}, which decoders and T5s answer in words;
  digits, of images; or of your own --data: classification, regression, or
  instructions, for a decoder to respond to."""
  path: str = option("", flag="data")
  """Your own rows: a .csv, .tsv or .jsonl file (or .gz of one), a .parquet
  file, a folder of images (CLASS/*.png, or train/CLASS/*.png, or MNIST's IDX
  files), a folder that Hugging Face datasets saved, or tfds:NAME."""
  text: str = ""
  """Column of the text, or several, as title,body; empty: text, sentence,
  review and their like."""
  text_pair: str = ""
  """Column of the second text of a pair; empty: the second of sentence1 and
  sentence2, premise and hypothesis and their like."""
  label: str = ""
  """Column of the label; empty: label, class, target and their like."""
  validation: str = ""
  """Rows to validate on, as --data; empty: some of --data are held out."""
  test: str = ""
  """Rows to test on, as --data; empty: some of --data are held out."""
  held_out: float = option(0.0, least=0, below=0.45)
  """Share of --data that is held out for validation, and again for the test; 0:
  0.1, and of instructions 0.02 where that is a row."""
  data_dir: str = ""
  """Where data sets are prepared; empty: the user's cache folder."""
  train_rows: int = option(0, least=0)
  """Training rows to draw by the seed; 0: all."""
  eval_rows: int = option(0, least=0)
  """Rows to draw for validation, and for the test; 0: all."""
  label_noise: float = option(0.0, least=0, below=1)
  """Share of the training labels that are made wrong, drawn by the seed; the
  test keeps its labels (classification)."""
  label_noise_kind: NoiseKind = "symmetric"
  """Which labels are made wrong: of any class, and any other label in their
  place; or of the classes 1, 3, 5, ..., and the label before in their place."""
  one_rater: bool = False
  """Learn from the label of one of a row's raters, drawn by the seed, in place
  of that of their mean, which the test keeps (rated-sentences)."""
  noisy_validation: bool = False
  """Draw the labels of the validation rows in the way of the training rows."""
  imbalance: float = option(0.0, least=0, below=1)
  """Training rows of the rarest class over those of the most frequent one; the
  classes between fall off exponentially; 0: classes as they come
  (classification)."""
  max_length: int = option(256, least=3, below=2**21)
  """Tokens in an example; longer ones are cut."""
  image_size: int = option(0, least=0, below=2**13)
  """Pixels along the side of the square that images are resized to; 0: what the
  model's preprocessor_config.json says, or what its positions were learned at;
  of an ONNX file at most 224."""
  pack: bool = True
  """Put several conversations in a row of max_length tokens (instructions)."""
  on_long: OnLong = "cut"
  """What to do about a conversation of more than max_length tokens: cut its
  end, leave it out, or refuse it; one whose prompt alone is too long is left
  out in either of the first two, and counted (instructions)."""
  group_by_length: int = option(0, least=0)
  """Batches' worth of shuffled rows to sort by length before they are cut into
  batches: less padding, less random batches; 0: none."""
  chat_template: str = ""
  """File of a chat template, in Jinja, in place of the model's
  (instructions)."""

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
      "--data names the rows of --task classification, regression or"
      " instructions, and belongs to no other task; got"
      f" {options.path!r} with --task {options.task}."
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
          f"{spelt(name)} is of --task {' or '.join(takers)}; got it with"
          f" --task {options.task}."
        )
  if options.text_pair and not options.text:
    raise UsageError(
      "--text-pair is the second text of a pair, whose first is --text; got"
      f" --text-pair {options.text_pair} alone."
    )
  if options.held_out and options.validation and options.test:
    raise UsageError(
      "--held-out is for a --data without a --validation or a --test of their"
      " own; got all three."
    )


def _check_regime(options: DataOptions) -> None:
  task = registry.get(options.task)
  for name in ("label_noise", "imbalance"):
    value = getattr(options, name)
    if value and task.kind != "classification":
      raise UsageError(
        f"{spelt(name)} is of classes; got {value:g} with --task {task.name},"
        f" of {task.kind}."
      )
  if options.one_rater and not task.votes:
    able = [x for x in registry.names() if registry.get(x).votes]
    raise UsageError(
      f"--one-rater is of --task {' or '.join(able)}, whose rows have several"
      f" raters; got it with --task {task.name}."
    )
  if options.noisy_validation and not (
    options.label_noise or options.one_rater
  ):
    raise UsageError(
      "--noisy-validation goes with --label-noise or --one-rater; got neither."
    )
