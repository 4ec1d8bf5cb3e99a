"""`python -m train export`: writes a trained model for other programs."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
import shutil
import sys

import huggingface_hub
import numpy as np

from bilora_jax import peft

from .. import checked, files, locks
from ..errors import UsageError
from ..models.io import weights
from . import card, hub, llama_cpp
from .finished import Finished, open_run
from .options import Export

# The files that transformers needs for a tokenizer or a processor.
_TOKENIZER = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.txt",
  "vocab.json",
  "merges.txt",
  "spiece.model",
  "sentencepiece.bpe.model",
  "spm.model",
  "tokenizer.model",
  "chat_template.jinja",
  "chat_template.json",
  "generation_config.json",
  "preprocessor_config.json",
  "video_preprocessor_config.json",
  "processor_config.json",
)
_SHARD = 2 * 10**9  # bytes
_WRITTEN = ("adapter_config.json", "config.json")
"""Every export has one of these files."""


def main(options: Export) -> int:
  """Writes the folder, and prints what it contains. Returns 0.

  Raises:
    ValueError: if the run does not exist, cannot be exported with these
      options, or is refused by the hub.
    OSError: if a file cannot be written, or the hub cannot be reached.
  """
  out = pathlib.Path(options.out).expanduser().absolute()
  if options.private and not options.push_to_hub:
    raise UsageError("--private needs --push-to-hub, which is missing.")
  if options.push_to_hub:
    hub.check(options.push_to_hub)
  with locks.held(out.with_name(f".{out.name}.lock"), f"--out {out}"):
    _sweep(out)
    _check_out(out, options.overwrite)
    return _export(options, out)


def _export(options: Export, out: pathlib.Path) -> int:
  run = open_run(options.run, accept_changes=options.accept_changes)
  _check_other(out, run)
  whole = options.merged or run.adapted is None
  if options.gguf:
    llama_cpp.check(run, whole)
  base, note = options.base_model, ""
  if not base:
    base, note = weights.origin(run.config.model.name)
  if not base:
    print(
      f"warning: {run.config.model.name} is a local model; give its name on "
      "the hub with --base-model, so that others can find it.",
      file=sys.stderr,
    )
  elif note and not whole:
    print(f"warning: {note}", file=sys.stderr)
  with _replacing(out) as part:
    if whole or run.adapted is None:
      _write_model(part, run)
      what = f"{out} is a {_kind(run)} for transformers."
    else:
      peft.save(
        part,
        run.adapted,
        run.adapters,
        run.pretrained.kind(run.model).names,
        base_model=base or card.LOCAL,
        task_type=run.pretrained.kind(run.model).task_type,
        # A run keeps its second adapter only if its options say so.
        auxiliary="auxiliary" in run.adapters,
      )
      what = f"{out} is a LoRA for PEFT, on a {_kind(run)}."
      if options.gguf:
        llama_cpp.write(part / "adapter.gguf", run)
        what += f" {out / 'adapter.gguf'} is a LoRA for llama.cpp."
    _write_tokenizer(part, run)
    text = card.write(run, base, note, options.push_to_hub or out.name, whole)
    (part / "README.md").write_text(text)
  print(what)
  if options.push_to_hub:
    print(hub.push(out, options.push_to_hub, options.private))
  return 0


def _kind(run: Finished) -> str:
  return run.pretrained.kind(run.model).architecture


def _check_out(out: pathlib.Path, overwrite: bool) -> None:
  """Refuses a folder that is not empty, unless it may be replaced."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return
  if not overwrite:
    raise UsageError(
      f"--out must be a new or an empty folder; got {out}, which is there and "
      "is not an empty folder (--overwrite replaces an export)."
    )
  if not any((out / name).is_file() for name in _WRITTEN):
    raise UsageError(
      f"--overwrite only replaces a folder that export wrote; got {out}, "
      f"which has neither {' nor '.join(_WRITTEN)}."
    )


def _check_other(out: pathlib.Path, run: Finished) -> None:
  """Refuses a folder that contains the run or its model."""
  for name, path in (("run", run.folder), ("model", run.pretrained.path)):
    if path.resolve().is_relative_to(out.resolve()):
      raise UsageError(
        f"--out {out} contains the {name} that is exported; give another "
        "folder."
      )


@contextlib.contextmanager
def _replacing(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder to write, and moves it to `out` at the end.

  The caller holds the lock.
  """
  part, old = _beside(out)
  try:
    with files.naming(out, part):
      part.mkdir()
      yield part
      _open_to_others(part)
      if out.exists():
        os.replace(out, old)
      os.replace(part, out)
  finally:
    _sweep(out)


def _beside(out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns the paths of the unfinished folder and of the replaced folder."""
  return out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")


def _sweep(out: pathlib.Path) -> None:
  """Removes the temporary folders, also those that a killed process left.

  A kill between the two renames leaves the old export only in its temporary
  folder. Then it is moved back.
  """
  part, old = _beside(out)
  if old.exists() and not out.exists():
    os.replace(old, out)
  for path in (part, old):
    shutil.rmtree(path, ignore_errors=True)


def _write_model(out: pathlib.Path, run: Finished) -> None:
  if "auxiliary" in run.adapters:
    raise UsageError(
      f"the run kept both adapters of {run.config.method.name}, and --merged "
      "can merge only one; export them without --merged, and merge them with "
      "PEFT."
    )
  params = run.variables["params"]
  if run.adapted is not None:
    # The base is rounded as in the run, because the adapters also learned to
    # correct the rounding.
    merged = run.adapted.merge(run.variables, run.adapters, donate=True)
    params = merged["params"]
  tensors = run.pretrained.tensors_of(run.model, params)
  labels: tuple[str, ...] = ()
  if run.pretrained.family.has_new_head:
    labels = run.labels or ("value",)
  config = run.pretrained.exported_config(run.model, tensors, labels)
  _write_tensors(out, tensors)
  files.write_json(out / "config.json", config)


def _write_tensors(
  out: pathlib.Path, tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes one file, or shards and an index; copies one shard at a time."""
  split = huggingface_hub.split_state_dict_into_shards_factory(
    dict(tensors),
    get_storage_size=lambda x: x.nbytes,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=_SHARD,
  )
  for file, names in split.filename_to_tensors.items():
    files.save_tensors(
      out / file, {name: tensors[name] for name in names}, {"format": "pt"}
    )
  if split.is_sharded:
    index = {
      "metadata": split.metadata,
      "weight_map": split.tensor_to_filename,
    }
    files.write_json(out / "model.safetensors.index.json", index)


def _write_tokenizer(out: pathlib.Path, run: Finished) -> None:
  pretrained, config = run.pretrained, {}
  if pretrained.path.is_dir():
    for name in _TOKENIZER:
      if (pretrained.path / name).is_file():
        shutil.copyfile(pretrained.path / name, out / name)
    path = out / "tokenizer_config.json"
    if path.is_file():
      config = checked.read_json(path)
  elif pretrained.text_tokenizer is not None:
    # On a full disk, the tokenizer's own `save` would raise no OSError but a
    # plain Exception.
    text = pretrained.text_tokenizer.to_str(pretty=True)
    (out / "tokenizer.json").write_text(text, "utf-8")
  if not (out / "tokenizer.json").is_file():
    return
  config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
  template = run.template
  if template is not None:
    config["chat_template"] = template.source
    config.setdefault("bos_token", template.bos or None)
    config.setdefault("eos_token", template.eos or None)
    (out / "chat_template.jinja").unlink(missing_ok=True)
  files.write_json(out / "tokenizer_config.json", config)


def _open_to_others(folder: pathlib.Path) -> None:
  """Sets the usual permissions; some writers let only the owner read."""
  # The mask can be read only by setting it.
  mask = os.umask(0)
  os.umask(mask)
  folder.chmod(0o777 & ~mask)
  for file in folder.iterdir():
    file.chmod(0o666 & ~mask)
