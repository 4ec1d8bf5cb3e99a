"""`python -m train generate`: what a decoder says, with a run's adapters."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import pathlib
import sys
from typing import Any, Literal

import jax
import numpy as np
import tyro

import bilora_jax

from .. import command
from ..data import gsm8k
from ..data import scores as evaluate
from ..errors import UsageError
from ..models import load
from ..models.decoder import generate
from ..models.decoder import model as decoder
from ..models.io.template import Message
from ..models.t5 import generate as t5_generate
from ..models.t5 import model as t5
from ..run import config as config_lib


@dataclasses.dataclass(frozen=True)
class Options:
  """Prints what a decoder says to each prompt, alone or with a run's adapters.

  A prompt is put as the user's message to the model's chat template. A T5 is
  given it as it is, and answers with its likeliest tokens.
  """

  prompt: tuple[str, ...] = ()
  """One or several prompts."""
  questions: str = ""
  """In place of prompts: a .jsonl or .jsonl.gz file of GSM8K's form, an object
  with question and answer a line."""
  score: Literal["none", "gsm8k"] = "none"
  """Count the answers to --questions that end in the right number: behind ####,
  or else the last one."""
  limit: int = 0
  """Questions to ask, the first of the file; 0: all."""
  batch_size: int = 16
  """Prompts that are answered together."""
  model: str = ""
  """Weights, as in a run; empty: those of --run."""
  run: str = ""
  """The folder of a run, whose adapters are put on."""
  plain: bool = False
  """Continue the prompts as they are, without a template."""
  max_new_tokens: int = 128
  """Tokens to add at most; an answer that is cut has no end to be scored."""
  temperature: float = 0.0
  """Of the draws; 0 takes the likeliest token."""
  top_k: int = 0
  """Draw from the likeliest k tokens; 0: from all."""
  top_p: float = 1.0
  """Draw from the likeliest tokens that make up this share."""
  seed: int = 0
  """Of the draws."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command. Returns 0, or 2 for bad usage."""
  options = tyro.cli(Options, args=argv, prog=f"{command.NAME} generate")
  try:
    _check(options)
    questions = gsm8k.load(options.questions) if options.questions else []
    questions = questions[: options.limit or None]
    prompts = options.prompt or [question.text for question in questions]
    answers = []
    for prompt, answer in zip(prompts, _answers(options, prompts)):
      print(f"> {prompt}\n{answer}\n", flush=True)
      answers.append(answer)
  except (ValueError, RuntimeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if options.score == "gsm8k":
    right = sum(map(gsm8k.is_right, answers, questions))
    print(_scored(right, len(questions)))
  return 0


def _check(options: Options) -> None:
  if not options.model and not options.run:
    raise UsageError("--model or --run names the weights; got neither.")
  if bool(options.prompt) is bool(options.questions):
    raise UsageError(
      "--prompt or --questions says what to answer; got "
      f"{'both' if options.prompt else 'neither'}."
    )
  if options.score != "none" and not options.questions:
    raise UsageError(
      f"--score {options.score} needs --questions, with the answers."
    )
  for name, least in (("limit", 0), ("batch_size", 1)):
    if getattr(options, name) < least:
      raise UsageError(
        f"--{name.replace('_', '-')} is at least {least}; got "
        f"{getattr(options, name)}."
      )


def _scored(right: int, count: int) -> str:
  low, high = evaluate.Evaluation({}, 0.0, right, count).interval() or (0, 1)
  return (
    f"{right} of {count} right: {100 * right / count:.1f}% (95%: "
    f"{100 * low:.1f} to {100 * high:.1f})"
  )


def _answers(options: Options, prompts: Sequence[str]) -> Iterator[str]:
  """Yields what is said to each prompt."""
  run = config_lib.Config()
  if options.run:
    run = config_lib.from_run(pathlib.Path(options.run))
  name = options.model or run.model.name
  pretrained = load.open_pretrained(name)
  if pretrained.template is None and not pretrained.is_t5:
    raise UsageError(f"an encoder does not generate; got {name}.")
  tokenizer = pretrained.tokenizer
  rows = [
    tokenizer.encode(
      _text(options, pretrained, prompt),
      add_special_tokens=options.plain or pretrained.is_t5,
    ).ids
    for prompt in prompts
  ]
  # A run's adapters are stacked where its layers were.
  if pretrained.is_t5:
    say = _t5(options, pretrained, pretrained.t5(scan=run.model.scan_layers))
  else:
    model = pretrained.language_model(scan=run.model.scan_layers)
    say = _decoder(options, pretrained, model)
  # One width, and one program, for all.
  width = max(map(len, rows))
  for start in range(0, len(rows), options.batch_size):
    some = rows[start : start + options.batch_size]
    # So that the last batch is of the others' shape.
    copies = [some[0]] * (min(options.batch_size, len(rows)) - len(some))
    tokens, mask = _padded([*some, *copies], width, pretrained.pad_id)
    found = np.asarray(say(tokens, mask, start)).tolist()
    for row in found[: len(some)]:
      yield tokenizer.decode(row)


def _text(options: Options, pretrained: load.Pretrained, prompt: str) -> str:
  if options.plain or pretrained.template is None:
    return prompt
  return pretrained.template.render(
    (Message("user", prompt),), add_generation_prompt=True
  )


def _padded(rows: list[list[int]], width: int, pad_id: int) -> tuple[Any, Any]:
  return (
    np.array([row + [pad_id] * (width - len(row)) for row in rows], np.int32),
    np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
  )


def _decoder(
  options: Options, pretrained: load.Pretrained, model: decoder.Decoder
) -> Callable[..., Any]:
  """From prompts, and where they start among all, to new tokens."""
  inputs = (jax.ShapeDtypeStruct((1, 2), "int32"),)
  apply = _apply(options, pretrained, model, inputs, "decode")

  def say(tokens, mask, start):
    return generate.generate(
      model,
      apply,
      tokens,
      mask,
      options.max_new_tokens,
      temperature=options.temperature,
      top_k=options.top_k,
      top_p=options.top_p,
      key=jax.random.fold_in(jax.random.key(options.seed), start),
      eos_id=pretrained.eos_id,
    )

  return say


def _t5(
  options: Options, pretrained: load.Pretrained, model: t5.T5
) -> Callable[..., Any]:
  """As `_decoder`, of a T5."""
  if options.temperature:
    raise UsageError(
      "a T5 answers with its likeliest tokens, at --temperature 0; got "
      f"{options.temperature}."
    )
  inputs = (jax.ShapeDtypeStruct((1, 2), "int32"),) * 3
  apply = _apply(options, pretrained, model, inputs, "encode", "decode")

  def say(tokens, mask, start):
    del start
    return t5_generate.greedy(
      model, apply, tokens, mask, options.max_new_tokens
    )

  return say


def _apply(
  options: Options,
  pretrained: load.Pretrained,
  model: Any,
  inputs: tuple[Any, ...],
  *methods: str,
) -> functools.partial:
  """Calls the model with its variables, and with the run's adapters."""
  variables = pretrained.variables(model, 0)
  if not options.run:
    return functools.partial(model.apply, variables)
  folder = pathlib.Path(options.run) / "adapters"
  adapted = bilora_jax.adapt(
    model,
    bilora_jax.load_spec(folder),
    *inputs,
    methods=("__call__", *methods),
  )
  if adapted.spec.base_dtype is not None:
    variables = adapted.quantize(variables, donate=True)
  adapters = bilora_jax.load_adapters(folder, adapted)
  return functools.partial(adapted.apply, variables, adapters)
