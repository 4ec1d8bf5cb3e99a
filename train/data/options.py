"""Options of the data."""

import dataclasses
from typing import Literal

from ..options import option


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """The data to train on."""

  task: str = option("snippets")
  """The data set: snippets, glue/{cola,sst2,mrpc,qnli,mnli,rte} or
  super_glue/{boolq,cb,copa,wic}, which decoders and T5s answer in words;
  digits, of images; or instructions, for a decoder to respond to."""
  path: str = option("", flag="data")
  """Of instructions: a .jsonl or .jsonl.gz file, or tfds:NAME."""
  train_rows: int = option(0, least=0)
  """Training rows to draw by the seed; 0: all."""
  eval_rows: int = option(0, least=0)
  """Rows to draw for validation, and for the test; 0: all."""
  max_length: int = option(256, least=3)
  """Tokens in an example; longer ones are cut."""
  group_by_length: int = option(0, least=0)
  """Batches' worth of shuffled rows to sort by length before they are cut into
  batches: less padding, less random batches; 0: none."""
  pack: bool = option(True)
  """Put several conversations in a row of max_length tokens (instructions)."""
  on_long: Literal["cut", "skip", "error"] = option("cut")
  """What to do about a conversation of more than max_length tokens: cut its
  end, leave it out, or refuse it; one whose prompt alone is too long is left
  out in either of the first two, and counted (instructions)."""
  data_dir: str = option("")
  """Where data sets are prepared; empty: the user's cache folder."""
