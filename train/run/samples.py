"""Generates answers to the first validation prompts during a run."""

from collections.abc import Callable
import functools
import itertools
import json
import pathlib
from typing import Any

import numpy as np

import bilora_jax

from .. import checked, files, jsonl
from ..data import load as data_lib
from . import journal as journal_lib
from .assemble import Prepared

FILE = "samples.jsonl"
_NEW_TOKENS = 64


def sampler(
  prepared: Prepared, journal: journal_lib.Journal, step: int
) -> Callable[[int, Any], None]:
  """Returns a function of `(step, evaluated)` that shows and saves answers.

  Args:
    prepared: a prepared run on conversations.
    journal: the journal that gets the answers.
    step: the step after which the run begins or resumes. Answers of later steps
      are removed from the file.
  """
  tokenizer = prepared.opened.tokenizer
  rows = _prompts(prepared)
  prompts = [tokenizer.decode(row) for row in rows]
  answer = _generator(prepared)
  path = prepared.folder / FILE
  kept = jsonl.read_log(path)
  for row in kept:
    checked.field(str(path), row, "step", int)
  kept = [row for row in kept if row["step"] <= step]
  if journal.is_heard:
    files.write_atomically(path, "".join(json.dumps(x) + "\n" for x in kept))

  def sample(step: int, evaluated: Any) -> None:
    answers = [tokenizer.decode(row) for row in answer(evaluated, rows)]
    if journal.is_heard:
      _append(path, step, prompts, answers)
    for prompt, said in zip(prompts, answers):
      journal.say(f"step {step:>6}  to {prompt!r}: {said!r}")

  return sample


def _append(path: pathlib.Path, step: int, prompts: Any, answers: Any) -> None:
  with path.open("a") as file:
    for prompt, said in zip(prompts, answers):
      row = {"step": step, "prompt": prompt, "answer": said}
      file.write(json.dumps(row) + "\n")


def _prompts(prepared: Prepared) -> list[list[int]]:
  """Returns validation prompts: rows up to the first token that is learned."""
  assert isinstance(prepared.data, data_lib.Conversations)
  found = prepared.data.packed["validation"].sequences
  ends = found.offsets.tolist()
  rows = []
  for start, end in itertools.pairwise(ends):
    learned = np.flatnonzero(found.loss[start:end])
    # A row that was cut before its answer is no whole prompt.
    if len(learned) and learned[0]:
      rows.append(found.tokens[start : start + learned[0]].tolist())
    if len(rows) == prepared.config.evaluation.samples:
      break
  return rows


def _generator(
  prepared: Prepared,
) -> Callable[[Any, list[list[int]]], list[list[int]]]:
  """Returns a function from evaluated weights and prompts to answers.

  Prompts and answers are tokens.
  """
  opened, model, layout = prepared.opened, prepared.model, prepared.layout
  adapted = prepared.method.adapted
  if adapted is not None:
    # Adapters act only in the methods that `adapt` was given.
    inputs = prepared.data.objective.inputs(next(prepared.data.train_batches()))
    adapted = bilora_jax.adapt(
      model,
      adapted.spec,
      *inputs,
      methods=("__call__", *opened.family.generate_methods),
    )

  def answer(evaluated, rows):
    variables = prepared.variables
    if adapted is None:
      params = {**variables["params"], **evaluated}
      apply = functools.partial(model.apply, {**variables, "params": params})
    else:
      apply = functools.partial(adapted.apply, variables, evaluated)
    width = max(map(len, rows))
    tokens = np.full((len(rows), width), opened.pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
      tokens[i, : len(row)], mask[i, : len(row)] = row, True
    room = model.config.max_positions - width
    say = opened.generator(model, apply, max_new_tokens=min(_NEW_TOKENS, room))
    found = layout.within(say)(tokens, mask)
    return np.asarray(layout.gather(found)).tolist()

  return answer
