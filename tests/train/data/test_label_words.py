"""Label words: prompts that keep their ends, and tokens that tell labels."""

import functools

import byte_level
import numpy as np
import pytest
import tokenizers
from tokenizers import models, processors

from train.data import label_words, pipeline
from train.data import registry as tasks
from train.data.task import Task
from train.models.decoder import label_words as decoder_words
from train.models.t5 import label_words as t5_words

NAMES = [name for name in tasks.names() if tasks.get(name).texts]
WORDS = [word for name in NAMES for word in tasks.get(name).answers]
TOKENIZER = byte_level.train(
  [f"result: {word}" for word in [*WORDS, "different", "first", "second"]] * 3,
  ["<s>"],
  merges=300,
)
TOKENIZER.post_processor = processors.TemplateProcessing(
  single="<s> $A", special_tokens=[("<s>", 0)]
)
PAIR = tasks.get("glue/mrpc")
LABELS = tasks.get("snippets").labels
SINGLE = tasks.get("glue/cola")


def _prompts(task, texts, max_length=1000):
  encoded = label_words.encode(TOKENIZER, task, texts, max_length)
  for ids, types in encoded:
    assert 0 < len(ids) <= max_length
    assert types == [0] * len(ids)
  return [byte_level.decode(TOKENIZER, ids) for ids, _ in encoded]


def test_a_prompt_is_an_instruction_the_texts_and_result():
  texts = [("A cat.", "A\ndog."), ("", "é")]
  head = "<s>classify the semantic similarity of the two texts:\n"
  assert _prompts(PAIR, texts) == [
    f"{head}A cat.\nA\ndog.\nresult:",
    f"{head}\né\nresult:",
  ]
  assert _prompts(SINGLE, ["It sit."]) == [
    "<s>classify the grammaticality of the text:\nIt sit.\nresult:"
  ]


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_a_prompt_and_labels_that_tell_apart(name):
  task = tasks.get(name)
  text = "a" if len(task.texts) == 1 else ("a", "b")
  (found,) = _prompts(task, [text])
  instruction, *lines = found.removeprefix("<s>").split("\n")
  assert instruction == task.instruction
  assert lines == [*text, "result:"]
  words = task.answers
  ids = decoder_words.tokens(TOKENIZER, words, "\nresult:")
  assert len(set(ids)) == len(ids) == len(words) == len(task.labels)
  for (first,), word in zip(ids, words):
    whole = TOKENIZER.encode(f"{found} {word}", add_special_tokens=False).ids
    prompt = TOKENIZER.encode(found, add_special_tokens=False).ids
    assert whole[: len(prompt) + 1] == [*prompt, first]


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("snippets", ("negative", "positive")),
    ("glue/cola", ("unacceptable", "acceptable")),
    ("glue/mrpc", ("different", "equivalent")),
    ("glue/mnli", ("entailment", "neutral", "contradiction")),
    ("glue/qnli", ("entailment", "not_entailment")),
    ("super_glue/copa", ("first", "second")),
  ],
)
def test_words_are_those_of_the_papers_protocol(name, words):
  assert tasks.get(name).answers == words


def test_a_long_text_loses_its_end_and_the_prompt_does_not():
  text = "abcdefghij " * 20
  whole = len(label_words.encode(TOKENIZER, SINGLE, [text], 1000)[0][0])
  empty = len(label_words.encode(TOKENIZER, SINGLE, [""], 1000)[0][0])
  (head,) = _prompts(SINGLE, [""])
  head = head.removesuffix("\nresult:")
  for length in range(empty + 1, whole + 1):
    ids, _ = label_words.encode(TOKENIZER, SINGLE, [text], length)[0]
    assert len(ids) == length
    cut = byte_level.decode(TOKENIZER, ids)
    assert cut.startswith(head)
    assert cut.endswith("\nresult:")
    assert text.startswith(cut.removeprefix(head).removesuffix("\nresult:"))
  assert cut == f"{head}{text}\nresult:"
  with pytest.raises(
    ValueError, match=rf"must exceed the {empty} tokens of a prompt of glue/co"
  ):
    label_words.encode(TOKENIZER, SINGLE, [text], empty)


def test_of_a_pair_the_longer_text_is_cut():
  short, long = "xyz", "xyz" * 30
  (shortest,) = label_words.encode(TOKENIZER, PAIR, [(short, short)], 1000)
  for pair in ((short, long), (long, short)):
    (found,) = _prompts(PAIR, [pair], len(shortest[0]) + 6)
    first, second, result = found.split("\n")[1:]
    kept = (first, second)[pair.index(short)]
    cut = (first, second)[pair.index(long)]
    assert kept == short
    assert len(short) < len(cut) < len(long)
    assert result == "result:"


def test_batches_are_those_of_other_examples():
  rows = [pipeline.Row("a " * n, n % 2) for n in range(1, 8)]
  encode = functools.partial(label_words.encode, TOKENIZER, SINGLE)
  examples = pipeline.tokenize(rows, encode, 64)
  for batch in pipeline.eval_batches(examples, 4):
    last = batch["mask"].sum(axis=1) - 1
    ends = batch["tokens"][np.arange(4), last]
    # The answer follows the last token of each row, the colon.
    assert set(ends.tolist()) == {TOKENIZER.encode("result:").ids[-1]}
    np.testing.assert_array_equal(
      batch["labels"], np.take([row.label for row in rows], batch["index"])
    )


def test_labels_that_begin_with_one_token_are_named():
  letters = byte_level.train([], merges=0)
  with pytest.raises(
    ValueError,
    match="'negative' and 'positive' begin with the same token",
  ):
    decoder_words.tokens(letters, LABELS, "\nresult:")


def test_a_label_without_a_token_is_named():
  one = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
  with pytest.raises(ValueError, match="label 'do' has no tokens in this"):
    decoder_words.tokens(one, ["do", "a"], "")


def test_words_of_a_t5_are_all_their_tokens_and_the_end():
  task = tasks.get("glue/qnli")
  found = t5_words.tokens(TOKENIZER, task.labels, 7)
  assert [byte_level.decode(TOKENIZER, ids[:-1]) for ids in found] == [
    *task.labels
  ]
  assert {ids[-1] for ids in found} == {7}
  assert len({len(ids) for ids in found}) == 2


def test_words_of_a_t5_that_are_the_same_are_named():
  unknown = tokenizers.Tokenizer(models.WordLevel({"?": 0}, "?"))
  with pytest.raises(
    ValueError, match="'negative' and 'positive' have the same tokens"
  ):
    t5_words.tokens(unknown, LABELS, 0)
  nothing = tokenizers.Tokenizer(models.BPE())
  with pytest.raises(ValueError, match="'negative' has no tokens"):
    t5_words.tokens(nothing, LABELS, 0)


def test_a_task_of_no_prompt_is_asked_for_its_labels():
  task = Task("own", texts=("{a}",), labels=("no", "yes"))
  assert _prompts(task, ["b"]) == ["<s>classify the text:\nb\nresult:"]
  assert task.answers == ("no", "yes")
