"""`python -m train generate`: what a decoder says, with a run's adapters."""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import tyro

import bilora_jax
from train import config as config_lib
from train.errors import UsageError
from train.models import decoder, generate, load
from train.tasks import chat
from train.tasks.instructions import Message


@dataclasses.dataclass(frozen=True)
class Options:
  """Prints what a decoder says to each prompt, alone or with a run's adapters.

  A prompt is put as the user's message to the model's chat template.
  """

  prompt: tuple[str, ...]
  """One or several prompts, answered together."""
  model: str = ""
  """Weights, as in a run; empty: those of --run."""
  run: str = ""
  """The folder of a run, whose adapters are put on."""
  plain: bool = False
  """Continue the prompts as they are, without a template."""
  max_new_tokens: int = 128
  """Tokens to add at most."""
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
  options = tyro.cli(Options, args=argv, prog="python -m train generate")
  try:
    answers = _answers(options)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  for prompt, answer in zip(options.prompt, answers):
    print(f"> {prompt}\n{answer}\n")
  return 0


def _answers(options: Options) -> list[str]:
  if not options.model and not options.run:
    raise UsageError("--model or --run names the weights; got neither.")
  run = config_lib.Config()
  if options.run:
    run = config_lib.from_run(pathlib.Path(options.run))
  name = options.model or run.model
  pretrained = load.open_pretrained(name)
  if pretrained.template is None:
    raise UsageError(f"an encoder does not generate; got {name}.")
  tokenizer = pretrained.tokenizer
  tokens, mask = _padded(
    [
      tokenizer.encode(
        _text(options, pretrained.template, prompt),
        add_special_tokens=options.plain,
      ).ids
      for prompt in options.prompt
    ],
    pretrained.pad_id,
  )
  # A run's adapters are stacked where its layers were.
  model = pretrained.language_model(scan=run.scan_layers)
  found = generate.generate(
    model,
    _apply(options, pretrained, model),
    tokens,
    mask,
    options.max_new_tokens,
    temperature=options.temperature,
    top_k=options.top_k,
    top_p=options.top_p,
    key=jax.random.key(options.seed),
    eos_id=pretrained.eos_id,
  )
  return [tokenizer.decode(row) for row in np.asarray(found).tolist()]


def _text(options: Options, template: chat.Template, prompt: str) -> str:
  if options.plain:
    return prompt
  return template.render((Message("user", prompt),), add_generation_prompt=True)


def _padded(rows: list[list[int]], pad_id: int) -> tuple[Any, Any]:
  width = max(map(len, rows))
  return (
    np.array([row + [pad_id] * (width - len(row)) for row in rows], np.int32),
    np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
  )


def _apply(
  options: Options, pretrained: load.Pretrained, model: decoder.Decoder
) -> functools.partial:
  variables = pretrained.variables(model, 0)
  if not options.run:
    return functools.partial(model.apply, variables)
  folder = pathlib.Path(options.run) / "adapters"
  adapted = bilora_jax.adapt(
    model,
    bilora_jax.load_spec(folder),
    jax.ShapeDtypeStruct((1, 2), "int32"),
    methods=("__call__", "decode"),
  )
  if adapted.spec.base_dtype is not None:
    variables = adapted.quantize(variables, donate=True)
  adapters = bilora_jax.load_adapters(folder, adapted)
  return functools.partial(adapted.apply, variables, adapters)
