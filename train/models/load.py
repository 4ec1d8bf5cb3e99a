"""Opens a pretrained model: the configuration now, the weights later."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from . import registry
from .family import Pretrained
from .io import (
  gguf_file,
  gguf_tokenizer,
  quantised,
  tensors,
  token_ids,
  vocabulary,
  weights,
)
from .io import template as templates

__all__ = ["Pretrained", "open_pretrained"]


def open_pretrained(
  name: str, revision: str = "", commit: str = "", head: str = "own"
) -> Pretrained:
  """Finds a model and reads everything except its weights.

  Args:
    name: a folder, a GGUF or ONNX file, 'minilm', 'smollm2', 'vit',
      'package:NAME' or a hub name; see `weights.locate`.
    revision: for a hub name, a branch, a tag or a commit; empty: the newest.
    commit: for a hub name, the commit of `revision` when it was first used.
    head: the value of `--head`: 'own', or 'sequence' for transformers' head for
      sequences.

  Raises:
    WeightsError: the model cannot be found or read, or its files do not fit
      each other.
  """
  files = [x.suffix for x in registry.families() if x.suffix]
  path = weights.locate(name, revision, (".gguf", *files), commit)
  if path.is_dir():
    found = _open_folder(path, head)
  elif path.suffix == ".gguf":
    found = _open_gguf(path, head)
  elif head != "own":
    raise weights.WeightsError(
      f"--head {head} is for models that read texts; got {path}."
    )
  else:
    found = _open_file(path)
  if found.text_tokenizer is not None:
    token_ids.check(
      found.text_tokenizer,
      found.config.vocab_size,
      getattr(found.config, "type_vocab_size", None),
      path,
    )
  try:
    found.family.check(found.config, found.tensors)
  except weights.WeightsError as error:
    raise weights.WeightsError(f"{path}: {error}") from error
  return found


def _open_folder(folder: pathlib.Path, head: str) -> Pretrained:
  hf_config = weights.read_config(folder)
  dequantise = quantised.reader(folder, hf_config)
  found = _opened(folder, hf_config, folder / "config.json", head)
  if found.family.reads == "texts":
    token_ids.check_folder(folder, found.config.vocab_size)
  stored = dequantise(folder, tensors.open_safetensors(folder))
  text_tokenizer = None
  if found.family.reads == "texts":
    text_tokenizer = vocabulary.load_tokenizer(folder)
  found = dataclasses.replace(
    found, tensors=stored, text_tokenizer=text_tokenizer
  )
  try:
    return found.family.complete(found)
  except ValueError as error:
    # Errors of a single file name the file; errors of several files do not.
    said = str(error)
    whose = "" if str(folder) in said else f"{folder}: "
    raise weights.WeightsError(f"{whose}{said}") from error


def _open_gguf(path: pathlib.Path, head: str) -> Pretrained:
  model = gguf_file.open_gguf(path)
  token_ids.check_named(
    {
      "tokenizer.ggml.bos_token_id": model.bos_id,
      "tokenizer.ggml.eos_token_id": model.eos_id,
      "tokenizer.ggml.padding_token_id": model.pad_id,
    },
    model.config["vocab_size"],
    path,
  )
  text_tokenizer = gguf_tokenizer.tokenizer(model)
  eos_id = model.eos_id

  def text(token_id: int | None) -> str:
    return text_tokenizer.id_to_token(token_id) or "" if token_id else ""

  return dataclasses.replace(
    _opened(path, model.config, path, head),
    tensors=model.tensors,
    text_tokenizer=text_tokenizer,
    pad_id=model.pad_id if model.pad_id is not None else eos_id or 0,
    eos_id=eos_id,
    stop_ids=() if eos_id is None else (eos_id,),
    template=templates.Template(
      model.chat_template or templates.PLAIN, text(model.bos_id), text(eos_id)
    ),
  )


def _open_file(path: pathlib.Path) -> Pretrained:
  family = next(x for x in registry.families() if x.suffix == path.suffix)
  assert family.read_file is not None
  config, stored, hf_config = family.read_file(path)
  return Pretrained(path, family, config, stored, hf_config=hf_config)


def _opened(
  path: pathlib.Path,
  hf_config: Mapping[str, Any],
  where: pathlib.Path,
  head: str,
) -> Pretrained:
  """Returns the model with its sizes, but without its tensors."""
  try:
    family = registry.by_model_type(hf_config.get("model_type"), head=head)
    config = family.config.from_hf(hf_config)
  except ValueError as error:
    raise weights.WeightsError(f"{where}: {error}") from error
  return Pretrained(path, family, config, {}, hf_config=hf_config)
