"""The tasks there are, as a table."""

from .task import Split, Task

_GLUE = "tensorflow_datasets.text.glue:Glue"
_SUPER_GLUE = f"{__package__}.super_glue:SuperGlueJsonl"
_FACEBOOK = "https://dl.fbaipublicfiles.com/"

_STORED = (
  Split("train", "train"),
  Split("validation", "validation"),
  Split("test", "test"),
)
_HELD_OUT = (
  Split("train", "train", "kept"),
  Split("validation", "train", "held_out"),
  Split("test", "validation"),
)
_MNLI = (
  *_HELD_OUT[:2],
  Split("test", "validation_matched"),
  Split("test_mismatched", "validation_mismatched"),
)


def _glue(
  config: str,
  file: str,
  texts: tuple[str] | tuple[str, str],
  labels: tuple[str, ...],
  **changes,
) -> Task:
  task = {
    "name": f"glue/{config}",
    "builder": _GLUE,
    "config": config,
    "texts": texts,
    "labels": labels,
    "splits": _HELD_OUT,
    "held_out": 0.1,
    "originals": ((file, f"{_FACEBOOK}glue/data/{file}"),),
  }
  return Task(**(task | changes))


def _super_glue(
  config: str,
  file: str,
  texts: tuple[str] | tuple[str, str],
  labels: tuple[str, ...],
) -> Task:
  url = f"{_FACEBOOK}glue/superglue/data/v2/{file}"
  return _glue(
    config,
    file,
    texts,
    labels,
    name=f"super_glue/{config}",
    builder=_SUPER_GLUE,
    originals=((file, url),),
  )


_TASKS = (
  Task(
    name="snippets",
    builder=f"{__package__}.movie_reviews:MovieReviewSnippets",
    config=None,
    texts=("{sentence}",),
    labels=("negative", "positive"),
    splits=_STORED,
  ),
  _glue(
    "cola",
    "CoLA.zip",
    ("{sentence}",),
    ("unacceptable", "acceptable"),
    metrics=("matthews_correlation", "accuracy"),
  ),
  # One row in fifty of the three large ones is already thousands.
  _glue(
    "sst2",
    "SST-2.zip",
    ("{sentence}",),
    ("negative", "positive"),
    held_out=0.02,
  ),
  _glue(
    "mrpc",
    "",
    ("{sentence1}", "{sentence2}"),
    ("not_equivalent", "equivalent"),
    originals=(
      (
        "data_mrpc_dev_ids.tsv",
        "https://firebasestorage.googleapis.com/v0/b/mtl-sentence-"
        "representations.appspot.com/o/data%2Fmrpc_dev_ids.tsv?alt=media"
        "&token=ec5c0836-31d5-48f4-b431-7480817f1adc",
      ),
      *(
        (file, f"{_FACEBOOK}senteval/senteval_data/{file}")
        for file in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")
      ),
    ),
  ),
  _glue(
    "qnli",
    "QNLIv2.zip",
    ("{question}", "{sentence}"),
    ("entailment", "not_entailment"),
    held_out=0.02,
  ),
  _glue(
    "mnli",
    "MNLI.zip",
    ("{premise}", "{hypothesis}"),
    ("entailment", "neutral", "contradiction"),
    splits=_MNLI,
    held_out=0.02,
  ),
  _glue(
    "rte",
    "RTE.zip",
    ("{sentence1}", "{sentence2}"),
    ("entailment", "not_entailment"),
  ),
  _super_glue(
    "boolq",
    "BoolQ.zip",
    ("{question}", "{passage}"),
    ("False", "True"),
  ),
  _super_glue(
    "cb",
    "CB.zip",
    ("{premise}", "{hypothesis}"),
    ("entailment", "contradiction", "neutral"),
  ),
  # One two-way problem: both choices are read at once and the label says which
  # is the more plausible. `question` is the word cause or effect.
  _super_glue(
    "copa",
    "COPA.zip",
    ("{premise} What was the {question}?", "1: {choice1} 2: {choice2}"),
    ("choice1", "choice2"),
  ),
  # The word goes before its first sentence; its positions are not used.
  _super_glue(
    "wic",
    "WiC.zip",
    ("{word}: {sentence1}", "{sentence2}"),
    ("False", "True"),
  ),
)
_BY_NAME = {task.name: task for task in _TASKS}


def names() -> tuple[str, ...]:
  """Returns the names of all tasks, the default one first."""
  return tuple(_BY_NAME)


def get(name: str = "snippets") -> Task:
  """Returns the task of that name.

  Raises:
    ValueError: if there is none.
  """
  if name not in _BY_NAME:
    allowed = ", ".join(_BY_NAME)
    raise ValueError(f"There is no task {name!r}; the tasks are {allowed}.")
  return _BY_NAME[name]
