"""Options of the commands that open a finished run."""

import dataclasses
from typing import Annotated, Literal

import tyro

from ..data.task import Task
from ..errors import UsageError
from ..options import option

_Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Columns:
  """Columns of --data, if their names differ from those of the run."""

  text_column: str = ""
  """Column with the text, or several columns separated by commas, such as
  title,body. Empty means the run's column."""
  text_pair_column: str = ""
  """Column with the second text of a pair. Empty means the run's column."""
  label_column: str = ""
  """Column with the label, if one is needed. Empty means the run's column."""

  def named(self, task: Task) -> Task:
    """The task, with these columns in place of its own."""
    given = [x for x in (self.text_column, self.text_pair_column) if x]
    if not given:
      return dataclasses.replace(task, label=self.label_column or task.label)
    if task.image:
      if self.text_pair_column:
        raise UsageError(
          "--text-pair-column is only for texts; the run read images."
        )
      return dataclasses.replace(task, image=self.text_column)
    if len(given) != len(task.texts) or not self.text_column:
      raise UsageError(
        f"the run read {len(task.texts)} text(s) a row: "
        f"--text-column{' and --text-pair-column' * (len(task.texts) - 1)}; "
        f"got {' and '.join(given)}."
      )
    return dataclasses.replace(
      task,
      texts=tuple(tuple(x.strip() for x in y.split(",")) for y in given),
      label=self.label_column or task.label,
    )


@dataclasses.dataclass(frozen=True)
class Predict:
  """Labels new rows by a finished run of any method.

  Rows keep their order. For each row the result has the most likely label and
  the probability of every label. For a regression it has the value.
  """

  run: str
  """The folder of a finished run."""
  data: str = ""
  """Rows to label: a .csv, .tsv, .jsonl or .parquet file, a folder of images or
  of Hugging Face datasets, or tfds:NAME."""
  text: Annotated[_Repeated, tyro.conf.arg(metavar="TEXT")] = ()
  """A text to label, in place of --data. Give the option again for another
  text."""
  text_pair: Annotated[_Repeated, tyro.conf.arg(metavar="TEXT")] = ()
  """The second text of each --text, if the run was trained on pairs."""
  image: Annotated[_Repeated, tyro.conf.arg(metavar="FILE")] = ()
  """An image to label, in place of --data. Give the option again for another
  image."""
  out: str = ""
  """File to write, which ends in .csv, .jsonl or .parquet. Empty means that the
  labels are printed."""
  overwrite: bool = False
  """Replace --out if the file exists."""
  batch_size: int = option(0, least=0, below=2**20)
  """Number of rows that are labelled together. 0 means the number of the
  run."""
  accept_changes: bool = False
  """Go on although the model is not the one that the run was trained on."""
  columns: tyro.conf.OmitArgPrefixes[Columns] = dataclasses.field(
    default_factory=Columns
  )


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Tests a finished run on labelled rows, or once more on its own test rows.

  For conversations the result is the perplexity of the responses.
  """

  run: str
  """The folder of a finished run."""
  data: str = ""
  """Rows with labels, in any format of predict --data, or conversations. Empty
  means the run's own test rows."""
  json: str = ""
  """File to which the numbers are also written. Empty means none."""
  overwrite: bool = False
  """Replace --json if the file exists."""
  batch_size: int = option(0, least=0, below=2**20)
  """Number of rows that are evaluated together. 0 means the number of the
  run."""
  accept_changes: bool = False
  """Go on although the model is not the one that the run was trained on."""
  columns: tyro.conf.OmitArgPrefixes[Columns] = dataclasses.field(
    default_factory=Columns
  )


@dataclasses.dataclass(frozen=True)
class Generate:
  """Prints what a model answers to each prompt, alone or as a run has trained
  it.

  Each prompt becomes the user's message in the chat template of the run or of
  the model. An encoder-decoder gets the prompt as it is, and answers with its
  most likely tokens.
  """

  prompt: tuple[str, ...] = ()
  """One or several prompts."""
  questions: str = ""
  """File of questions in the form of GSM8K, in place of prompts: .jsonl or
  .jsonl.gz, and each line is an object with question and answer."""
  score: Literal["none", "gsm8k"] = "none"
  """Count the right answers to --questions. gsm8k compares the number after
  ####, or the last number if there is no ####."""
  limit: int = option(0, least=0)
  """Number of questions to ask, from the beginning of the file. 0 means all
  questions."""
  batch_size: int = option(16, least=1, below=2**20)
  """Number of prompts that are answered together."""
  model: str = ""
  """Model that answers, named as in a run, in float32. Empty means the model of
  --run."""
  run: str = ""
  """The folder of a finished run. Its model answers in the dtypes of the
  run."""
  plain: bool = False
  """Continue the prompts as they are, without a chat template."""
  max_new_tokens: int = option(128, least=1, below=2**20)
  """Largest number of tokens in an answer. An answer that is cut has no end
  that --score could compare."""
  temperature: float = option(0.0, least=0)
  """Temperature of sampling. 0 takes the most likely token."""
  top_k: int = option(0, least=0)
  """Sample from the k most likely tokens. 0 means all tokens."""
  top_p: float = option(1.0, above=0)
  """Sample from the most likely tokens that make up this share of the
  probability."""
  seed: int = option(0, least=0, below=2**63)
  """Seed of sampling."""
  accept_changes: bool = False
  """Go on although the model is not the one that the run was trained on."""


@dataclasses.dataclass(frozen=True)
class Export:
  """Writes a run's adapters for PEFT, or its model for transformers.

  PEFT and transformers then compute the same as the run's test. A language
  model has the same logits. An encoder of texts becomes a token classifier, and
  the mean of its logits over the real tokens is the run's answer. An encoder of
  images becomes an image classifier. A run without adapters is always written
  as a whole model. README.md is a model card, with lines of Python that load
  the model.
  """

  run: str
  """The folder of a finished run."""
  out: str
  """The folder to write."""
  merged: bool = False
  """Write the whole model, with the adapters added to its weights."""
  gguf: bool = False
  """Also write adapter.gguf, the adapters for llama.cpp (for Llama, Mistral,
  Qwen 2 and Qwen 3, without DoRA and without a trained head)."""
  base_model: str = ""
  """Name on the hub of the model that the run started from. The model card
  tells it to readers. Empty means the name that the program knows for the run's
  --model."""
  overwrite: bool = False
  """Replace --out if it is an older export."""
  push_to_hub: str = ""
  """Upload the folder to this repository of the Hugging Face hub, named as
  user/name. Empty means no upload."""
  accept_changes: bool = False
  """Go on although the model is not the one that the run was trained on."""
  private: bool = False
  """Make a new repository private: only you and your organisation see it."""
