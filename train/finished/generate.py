"""`python -m train generate`: prints the answers of a model or of a run."""

from collections.abc import Callable, Iterator, Sequence
import functools
import sys
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import numpy as np

from ..data import gsm8k
from ..data import scores as evaluate
from ..errors import UsageError
from ..models import load
from ..models.family import Pretrained
from ..models.io import template as templates
from ..models.io import tokenizer as tokenizer_
from . import finished
from .options import Generate


def main(options: Generate) -> int:
  """Answers the prompts. Returns 0.

  Raises:
    ValueError: if the options are invalid, or the run or the model cannot
      generate.
  """
  _check(options)
  questions = gsm8k.load(options.questions) if options.questions else []
  questions = questions[: options.limit or None]
  prompts = options.prompt or [question.text for question in questions]
  answers = []
  for prompt, answer in zip(prompts, _answers(options, prompts)):
    print(f"> {prompt}\n{answer}\n", flush=True)
    answers.append(answer)
  if options.score == "gsm8k":
    right = sum(map(gsm8k.is_right, answers, questions))
    print(_scored(right, len(questions)))
  return 0


def _check(options: Generate) -> None:
  if not options.model and not options.run:
    raise UsageError("--model or --run must name the weights; got neither.")
  if bool(options.prompt) is bool(options.questions):
    raise UsageError(
      "either --prompt or --questions must say what to answer; got "
      f"{'both' if options.prompt else 'neither'}."
    )
  if options.score != "none" and not options.questions:
    raise UsageError(
      f"--score {options.score} needs --questions, a file with the answers."
    )
  if options.top_p > 1:
    raise UsageError(f"--top-p must be in (0, 1]; got {options.top_p}.")


def _scored(right: int, count: int) -> str:
  low, high = evaluate.Evaluation({}, 0.0, right, count).interval() or (0, 1)
  return (
    f"{right} of {count} right: {100 * right / count:.1f}% (95%: "
    f"{100 * low:.1f} to {100 * high:.1f})"
  )


def _answers(options: Generate, prompts: Sequence[str]) -> Iterator[str]:
  """Yields the answer to each prompt."""
  opened = _opened(options)
  pretrained, template = opened.pretrained, opened.template
  for note in pretrained.notes:
    print(f"note: {note}", file=sys.stderr)
  tokenizer = pretrained.tokenizer
  texts = [_text(options, template, prompt) for prompt in prompts]
  special = options.plain or template is None
  with tokenizer_.refusing():
    rows = [tokenizer.encode(x, add_special_tokens=special).ids for x in texts]
  say = pretrained.generator(
    opened.model,
    opened.apply(),
    max_new_tokens=options.max_new_tokens,
    temperature=options.temperature,
    top_k=options.top_k,
    top_p=options.top_p,
  )
  # All batches have one width, so one program is compiled for all.
  width = max(map(len, rows))
  for start in range(0, len(rows), options.batch_size):
    some = rows[start : start + options.batch_size]
    # Copies fill the last batch, so that it has the shape of the others.
    copies = [some[0]] * (min(options.batch_size, len(rows)) - len(some))
    tokens, mask = _padded([*some, *copies], width, pretrained.pad_id)
    key = jax.random.fold_in(jax.random.key(options.seed), start)
    found = np.asarray(say(tokens, mask, key)).tolist()
    for row in found[: len(some)]:
      yield tokenizer.decode(row)


class _Opened(NamedTuple):
  """The model that answers: a run's model, or a pretrained one."""

  pretrained: Pretrained
  template: templates.Template | None
  model: nn.Module
  apply: Callable[[], functools.partial]


def _opened(options: Generate) -> _Opened:
  if options.run:
    run = finished.open_run(options.run, options.model, options.accept_changes)
    _check_generates(run.pretrained)
    return _Opened(run.pretrained, run.template, run.model, run.apply)
  pretrained = load.open_pretrained(options.model)
  _check_generates(pretrained)
  model = pretrained.language_model()

  def apply() -> functools.partial:
    return functools.partial(model.apply, pretrained.variables(model))

  return _Opened(pretrained, pretrained.template, model, apply)


def _check_generates(pretrained: Pretrained) -> None:
  if pretrained.family.generate is None:
    raise UsageError(
      f"an encoder does not generate; got {pretrained.path}, a "
      f"{pretrained.family.name} (for a run's labels use predict)."
    )


def _text(
  options: Generate, template: templates.Template | None, prompt: str
) -> str:
  if options.plain or template is None:
    return prompt
  return template.render(
    (templates.Message("user", prompt),), add_generation_prompt=True
  )


def _padded(rows: list[list[int]], width: int, pad_id: int) -> tuple[Any, Any]:
  return (
    np.array([row + [pad_id] * (width - len(row)) for row in rows], np.int32),
    np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
  )
