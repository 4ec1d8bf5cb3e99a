"""Answers to the first validation prompts, generated as a run goes."""

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
  """Returns `(step, evaluated)`, which tells the answers and writes them down.

  Args:
    prepared: of a run on conversations.
    journal: that the answers are told to.
    step: after which the run begins or resumes; answers of later steps are
      dropped from the file.
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
  """The tokens of validation rows, up to the first that is learned."""
  assert isinstance(prepared.data, data_lib.Conversations)
  found = prepared.data.packed["validation"].sequences
  ends = found.offsets.tolist()
  rows = []
  for start, end in itertools.pairwise(ends):
    learned = np.flatnonzero(found.loss[start:end])
    # One that was cut before its answer has nothing to be answered.
    if len(learned) and learned[0]:
      rows.append(found.tokens[start : start + learned[0]].tolist())
    if len(rows) == prepared.config.evaluation.samples:
      break
  return rows


def _generator(
  prepared: Prepared,
) -> Callable[[Any, list[list[int]]], list[list[int]]]:
  """From what is evaluated, and prompts, to their answers, all in tokens."""
  opened, model, layout = prepared.opened, prepared.model, prepared.layout
  adapted = prepared.method.adapted
  if adapted is not None:
    # Adapters are active in the methods that they were planned for.
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
