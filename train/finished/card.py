"""Writes the model card of an export: facts, test results and code."""

from collections.abc import Mapping
from typing import Any

import huggingface_hub

from .. import options
from ..data import label_words
from ..run import report
from .finished import Finished

LOCAL = "local model; give --base-model"
"""The text in place of a base model that other people cannot get."""

# The numbers of a test that are not metrics.
_NO_METRIC = ("loss", "rows", "unit", "accuracy_95")


def write(run: Finished, base: str, note: str, name: str, whole: bool) -> str:
  """Returns the text of README.md.

  Args:
    run: the exported run.
    base: the name of the base model on the hub; empty if it has none.
    note: a sentence on differences between the base and the model of that name;
      empty if there are none.
    name: the name of the folder or of its repository.
    whole: whether the export is a whole model; if not, it has adapters.
  """
  test = (report.results(run.folder) or {}).get("test", {})
  library = "transformers" if whole else "peft"
  data = huggingface_hub.ModelCardData(
    base_model=base or None,
    library_name=library,
    tags=["bilora", run.config.method.name, run.config.data.task],
    model_name=name,
    eval_results=_eval_results(run, test),
  )
  what = "The model" if whole else "Adapters"
  parts = [
    f"---\n{data.to_yaml()}\n---",
    f"# {name}",
    f"{what} trained with `--method {run.config.method.name}`: "
    f"{run.config.method.spec.summary}.",
    _table("", {"base": base or LOCAL, **_facts(run)}),
  ]
  if note:
    parts.append(f"Note: {note}")
  if test:
    parts += ["## Test", _metrics(test)]
  parts += [
    "## Use",
    f"```python\n{snippet(run, base or LOCAL, name, whole)}```",
    "## Options",
    _table("option", _options(run)),
  ]
  return "\n\n".join(parts) + "\n"


def _facts(run: Finished) -> dict[str, Any]:
  task = run.task
  found: dict[str, Any] = {"task": f"{task.name} ({task.kind})"}
  if run.config.data.path:
    # Without its folder, which is private.
    found["data"] = run.config.data.path.rstrip("/").rpartition("/")[2]
  if run.labels:
    found["labels"] = options.listed(run.labels)
  return found


def _options(run: Finished) -> dict[str, Any]:
  """Returns the options that affect the results, without paths."""
  config = run.config
  found = options.values(config.method.options)
  if run.adapted is not None:
    found |= options.values(config.adapter)
    found.pop("adapter")
  found |= options.values(config.optimisation)
  found |= {"dtype": config.model.dtype, "base_dtype": config.model.base_dtype}
  return {**found, "max_length": config.data.max_length}


def _table(head: str, rows: Mapping[str, Any]) -> str:
  lines = [f"| {head} | |", "|---|---|"]
  return "\n".join(
    [*lines, *(f"| {name} | {value} |" for name, value in rows.items())]
  )


def _metrics(test: Mapping[str, Any]) -> str:
  rows = {
    name: f"{value:.4f}"
    for name, value in test.items()
    if name not in _NO_METRIC and value is not None
  }
  if test.get("accuracy_95"):
    low, high = test["accuracy_95"]
    rows["accuracy"] = rows.get("accuracy", "unknown")
    rows["accuracy"] += f" (95%: {low:.4f} to {high:.4f})"
  if test["loss"] is not None:
    rows["loss"] = f"{test['loss']:.4f}"
  return _table(f"on {test['rows']} test {test['unit']}", rows)


def _eval_results(
  run: Finished, test: Mapping[str, Any]
) -> list[huggingface_hub.EvalResult]:
  kind = "image" if run.task.image else "text"
  task = run.task.kind
  return [
    huggingface_hub.EvalResult(
      task_type="text-generation"
      if task == "conversations"
      else f"{kind}-{task}",
      dataset_type=run.task.name,
      dataset_name=run.task.name,
      dataset_split="test",
      metric_type=metric,
      metric_value=value,
    )
    for metric, value in test.items()
    if metric not in _NO_METRIC and value is not None
  ]


# From PEFT's types of tasks to classes in transformers. Models of images have
# no type of task.
_CLASSES = {
  "CAUSAL_LM": "AutoModelForCausalLM",
  "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
  "TOKEN_CLS": "AutoModelForTokenClassification",
  "SEQ_CLS": "AutoModelForSequenceClassification",
  None: "AutoModelForImageClassification",
}


def snippet(run: Finished, base: str, name: str, whole: bool) -> str:
  """Returns lines of Python that load the export and run an example."""
  task_type = run.pretrained.kind(run.model).task_type
  auto = _CLASSES[task_type]
  imports = [] if task_type is None else ["AutoTokenizer"]
  head = ["import torch"]
  if not whole:
    head.append("from peft import PeftModel")
  if task_type is None:
    head.insert(0, "import numpy as np")
    head.append("from PIL import Image")
  head.append(f"from transformers import {', '.join([auto, *imports])}")
  head.append("")
  labels = ""
  if run.pretrained.family.has_new_head and not whole:
    labels = f", num_labels={run.task.outputs}"
  if whole:
    head.append(f"folder = {name!r}")
    head.append(f"model = {auto}.from_pretrained(folder).eval()")
  else:
    revision = run.config.model.hub_revision
    labels += f", revision={revision!r}" * bool(revision)
    head += [f"base, folder = {base!r}, {name!r}"]
    head += [f"model = {auto}.from_pretrained(base{labels})"]
    head += ["model = PeftModel.from_pretrained(model, folder).eval()"]
  if task_type is not None:
    head.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
  body = _LINES[_form(run, task_type)](run)
  return "\n".join(head) + "\n" + body


def _form(run: Finished, task_type: str | None) -> str:
  if task_type is None:
    return "image"
  if task_type in ("TOKEN_CLS", "SEQ_CLS"):
    return "text"
  if run.task.kind == "conversations":
    return "conversation"
  return "word" if task_type == "CAUSAL_LM" else "words"


def _told(run: Finished) -> str:
  """Returns lines of Python that print the result from a row's logits."""
  task = run.task
  if task.kind == "regression":
    return f"print(float(logits[0]) * {task.spread!r} + {task.centre!r})\n"
  return (
    f"labels = {list(task.labels)!r}\n"
    "probabilities = logits.softmax(-1)\n"
    "print(labels[int(probabilities.argmax())], probabilities.tolist())\n"
  )


def _text(run: Finished) -> str:
  texts = ", ".join(map(repr, _examples(run)))
  return (
    f"batch = tokenizer({texts}, return_tensors='pt', truncation=True,\n"
    f"                  max_length={run.config.data.max_length})\n"
    "with torch.no_grad():\n"
    "  logits = model(**batch).logits[0]\n" + _pooled(run) + _told(run)
  )


def _pooled(run: Finished) -> str:
  """Returns lines of Python from the tokens' logits to those of the text."""
  kind = run.pretrained.kind(run.model)
  if kind.task_type != "TOKEN_CLS":
    return ""
  if kind.first:
    return (
      "# The model was trained on the logits of the first token.\nlogits = "
      "logits[0]\n"
    )
  return (
    "# The model was trained on the mean over the tokens.\nlogits = "
    "logits.mean(0)\n"
  )


def _examples(run: Finished) -> tuple[str, ...]:
  return ("A text.", "Another text.")[: len(run.task.texts)]


def _image(run: Finished) -> str:
  side, config = run.task.side, run.pretrained.config
  return (
    "image = Image.new('RGB', (64, 64))  # or Image.open(...).convert('RGB')\n"
    f"image = image.resize(({side}, {side}), Image.Resampling.BICUBIC)\n"
    "pixels = np.asarray(image, np.float32) / 255\n"
    f"pixels = (pixels - {config.mean}) / {config.deviation}\n"
    "pixels = torch.tensor(pixels.transpose(2, 0, 1)[None]).float()\n"
    "with torch.no_grad():\n"
    "  logits = model(pixels).logits[0]\n" + _told(run)
  )


def _prompt(run: Finished) -> str:
  first, *more = _examples(run)
  prompt = label_words.prompt(run.task, (first, more[0]) if more else first)
  return (
    f"prompt = {prompt!r}\nbatch = tokenizer(prompt, return_tensors='pt')\n"
  )


def _word(run: Finished) -> str:
  answers = label_words.answers(run.pretrained, run.task)
  assert not isinstance(answers, int)
  first = [tokens[0] for tokens in answers]
  return (
    _prompt(run) + "with torch.no_grad():\n"
    "  logits = model(batch['input_ids']).logits[0, -1]\n"
    f"logits = logits[{first}]  # of the tokens that begin the labels' words\n"
    + _told(run)
  )


def _words(run: Finished) -> str:
  return (
    _prompt(run) + "found = model.generate(input_ids=batch['input_ids'])\n"
    "print(tokenizer.decode(found[0], skip_special_tokens=True))\n"
  )


def _conversation(run: Finished) -> str:
  return (
    "messages = [{'role': 'user', 'content': 'Hello!'}]\n"
    "prompt = tokenizer.apply_chat_template(\n"
    "  messages, add_generation_prompt=True, tokenize=False)\n"
    "batch = tokenizer(prompt, return_tensors='pt', add_special_tokens=False)\n"
    "found = model.generate(input_ids=batch['input_ids'], max_new_tokens=64,\n"
    "                       do_sample=False)\n"
    "found = found[0, batch['input_ids'].shape[1]:]\n"
    "print(tokenizer.decode(found, skip_special_tokens=True))\n"
  )


_LINES = {
  "text": _text,
  "image": _image,
  "word": _word,
  "words": _words,
  "conversation": _conversation,
}
