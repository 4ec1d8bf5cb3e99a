"""The tasks that come with the program, one record each."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import numpy as np

from . import hashing, rated_sentences
from .registry import register
from .task import HELD_OUT, STORED, Source, Split, Task

_FACEBOOK = "https://dl.fbaipublicfiles.com/"
_MNLI = (*HELD_OUT[:2], Split("test", "validation_matched"))
_SENTIMENT = "classify the sentiment of the text:"
_RELATION = "classify the relation of the two texts:"
_ENTAILMENT = "does the first text entail the second?"

# Digits have no published splits. The remaining rows are the test split.
_DIGITS_ROWS = {"train": 600, "validation": 400}


def _tfds(
  name: str,
  builder: str,
  config: str | None = None,
  originals: tuple[tuple[str, str], ...] = (),
) -> Source:
  """Returns the source of a TFDS dataset, which the first read prepares.

  Args:
    name: the name of the task, for errors.
    builder: the TFDS builder, as `module:Class`.
    config: the builder's configuration, if it has any.
    originals: (file name, URL) of each file that the dataset is prepared from.
  """

  def read(split: str, data_dir: str | None) -> Sequence[Mapping[str, Any]]:
    from . import prepare  # TFDS is slow to import

    dataset = prepare.Dataset(name, builder, config, originals)
    return prepare.open_stored(dataset, split, data_dir)

  return Source(read, originals)


register(
  Task(
    "snippets",
    source=_tfds(
      "snippets", f"{__package__}.movie_reviews:MovieReviewSnippets"
    ),
    texts=("{sentence}",),
    labels=("negative", "positive"),
    splits=STORED,
    prompt=_SENTIMENT,
  )
)


def _rated(domain: str = "") -> None:
  prefix = f"{domain}/" if domain else ""
  others = [x for x in rated_sentences.DOMAINS if domain and x != domain]
  register(
    Task(
      f"rated-sentences/{domain}" if domain else "rated-sentences",
      source=Source(lambda split, _: rated_sentences.stored()[split]),
      texts=("{sentence}",),
      labels=rated_sentences.LABELS,
      words=rated_sentences.WORDS,
      votes="votes",
      splits=(
        *(Split(name, f"{prefix}{name}") for name, _, _ in STORED),
        # All rows of the other domains, as none is used for training.
        *(Split(name, name) for name in others),
      ),
      prompt=_SENTIMENT,
    )
  )


_rated()
for _domain in rated_sentences.DOMAINS:
  _rated(_domain)


def _glue(
  config: str,
  file: str,
  texts: tuple[str, ...],
  labels: tuple[str, ...],
  prompt: str,
  *,
  originals: tuple[tuple[str, str], ...] = (),
  held_out: float = 0.1,
  **more: Any,
) -> None:
  name = f"glue/{config}"
  source = _tfds(
    name,
    "tensorflow_datasets.text.glue:Glue",
    config,
    originals or ((file, f"{_FACEBOOK}glue/data/{file}"),),
  )
  fields = {"splits": HELD_OUT, "held_out": held_out, **more}
  register(
    Task(
      name, source=source, texts=texts, labels=labels, prompt=prompt, **fields
    )
  )


def _super_glue(
  config: str,
  file: str,
  texts: tuple[str, ...],
  labels: tuple[str, ...],
  prompt: str,
  **more: Any,
) -> None:
  name = f"super_glue/{config}"
  source = _tfds(
    name,
    f"{__package__}.super_glue:SuperGlueJsonl",
    config,
    ((file, f"{_FACEBOOK}glue/superglue/data/v2/{file}"),),
  )
  fields = {"splits": HELD_OUT, "held_out": 0.1, **more}
  register(
    Task(
      name, source=source, texts=texts, labels=labels, prompt=prompt, **fields
    )
  )


_glue(
  "cola",
  "CoLA.zip",
  ("{sentence}",),
  ("unacceptable", "acceptable"),
  "classify the grammaticality of the text:",
  metrics=("matthews_correlation", "accuracy"),
)
# The three large tasks hold out one row in fifty, which is over a thousand.
_glue(
  "sst2",
  "SST-2.zip",
  ("{sentence}",),
  ("negative", "positive"),
  _SENTIMENT,
  held_out=0.02,
)
_glue(
  "mrpc",
  "",
  ("{sentence1}", "{sentence2}"),
  ("not_equivalent", "equivalent"),
  "classify the semantic similarity of the two texts:",
  words=("different", "equivalent"),
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
)
_glue(
  "qnli",
  "QNLIv2.zip",
  ("{question}", "{sentence}"),
  ("entailment", "not_entailment"),
  "does the text entail the answer to the question?",
  held_out=0.02,
)
_glue(
  "mnli",
  "MNLI.zip",
  ("{premise}", "{hypothesis}"),
  ("entailment", "neutral", "contradiction"),
  _RELATION,
  splits=_MNLI,
  held_out=0.02,
)
_glue(
  "rte",
  "RTE.zip",
  ("{sentence1}", "{sentence2}"),
  ("entailment", "not_entailment"),
  _ENTAILMENT,
)
_super_glue(
  "boolq",
  "BoolQ.zip",
  ("{question}", "{passage}"),
  ("False", "True"),
  "answer the question from the passage:",
)
_super_glue(
  "cb",
  "CB.zip",
  ("{premise}", "{hypothesis}"),
  ("entailment", "contradiction", "neutral"),
  _RELATION,
)
# The model reads both choices at once, and the label says which one is more
# plausible. `question` is the word cause or effect.
_super_glue(
  "copa",
  "COPA.zip",
  ("{premise} What was the {question}?", "1: {choice1} 2: {choice2}"),
  ("choice1", "choice2"),
  "choose the more plausible of the two:",
  words=("first", "second"),
)
# The word comes before the first sentence. Its positions in the sentences are
# not used.
_super_glue(
  "wic",
  "WiC.zip",
  ("{word}: {sentence1}", "{sentence2}"),
  ("False", "True"),
  "does the word have the same meaning in both texts?",
)


@functools.cache
def _digits() -> dict[str, list[dict[str, Any]]]:
  """scikit-learn's 1,797 digits of 8 x 8 pixels, 600/400/797.

  They are the test rows of UCI's Optical Recognition of Handwritten Digits (E.
  Alpaydin and C. Kaynak, 1998, CC BY 4.0). The data do not name their 13
  writers, so each split has digits of all writers. The hash of a row's number
  decides its split.
  """
  from sklearn import datasets

  found: Any = datasets.load_digits()
  ink = np.round(found.images * (255 / 16)).astype(np.uint8)
  order = sorted(range(len(ink)), key=lambda i: hashing.digest(f"digits {i}"))
  rows = [{"image": ink[i], "label": int(found.target[i])} for i in order]
  ends = np.cumsum(list(_DIGITS_ROWS.values()))
  return {
    "train": rows[: ends[0]],
    "validation": rows[ends[0] : ends[1]],
    "test": rows[ends[1] :],
  }


register(
  Task(
    "digits",
    source=Source(lambda split, _: _digits()[split]),
    image="image",
    side=56,  # 4 x 4 patches of 14 pixels, each for 2 x 2 original pixels
    labels=tuple("0123456789"),
  )
)
# The tasks of the user's own rows, which `--data` names.
register(Task("instructions", "conversations", metrics=("perplexity",)))
register(Task("classification"))
register(
  Task("regression", "regression", metrics=("rmse", "pearson", "spearman"))
)
