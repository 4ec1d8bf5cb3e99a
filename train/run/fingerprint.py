"""The fingerprint of a run: rows, weights, tokenizer, template and plugins.

A fingerprint is small and takes little time. It shows whether these have
changed since the run began. Each checkpoint keeps it. The run's folder keeps it
too, for commands that use a finished run.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import sys
from typing import Any

import numpy as np

from .. import files
from ..data import load as data_lib
from ..errors import UsageError
from ..models.family import Pretrained
from ..models.io import template as templates
from ..models.io import tensors, vocabulary, weights
from . import checkpoints
from . import config as config_lib
from .config import Config

FILE = "fingerprint.json"
_OWN_TOKENIZER = "tokenizer.json"
_TOKENIZER = (_OWN_TOKENIZER, "spiece.model", "tokenizer_config.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Files of up to so many bytes together are read whole, in less than 0.1 s. From
# larger files, only samples are read: the header, the beginning of every tensor
# and evenly spaced places.
_WHOLE = 2**25
_HEAD = 2**23
_SAMPLE = 2**12
_SAMPLES = 256
_MOST_TENSORS = 4096


def of(
  config: Config, pretrained: Pretrained, data: data_lib.Data
) -> dict[str, Any]:
  """Returns the fingerprint of a run, as JSON.

  It has the sizes and digests of files, by names without folders, so files may
  be moved. The digests of large files are over samples, so a change of a few
  weights may stay unnoticed.

  Args:
    config: the configuration of the run.
    pretrained: the pretrained model.
    data: the data; the fingerprint has a digest of the encoded rows.
  """
  template = None
  if isinstance(data, data_lib.Conversations):
    template = data.template
  adapter = pathlib.Path(config.adapter.path).expanduser()
  return {
    **_base(pretrained, template),
    "rows": _rows(data),
    "labels": list(data.task.labels),
    "adapter": _files([adapter / name for name in _ADAPTER])
    if config.adapter.path
    else {},
    "plugins": _files(list(_plugins(config))),
    "config": config_lib.nested(config),
  }


def begin(folder: pathlib.Path, fingerprint: Mapping[str, Any]) -> None:
  """Writes a fingerprint into a run's folder."""
  files.write_json(folder / FILE, fingerprint)


def commit(folder: pathlib.Path) -> str:
  """Returns the hub's commit of a run's model; empty if there is none."""
  return str(_begun(folder)[1].get("commit") or "")


def configuration(folder: pathlib.Path) -> Config | None:
  """Returns the configuration in a run's fingerprint, or None.

  It replaces a config.json that is missing.

  Raises:
    UsageError: if it cannot be read.
  """
  begun = _begun(folder)[1]
  if "config" not in begun:
    return None
  return config_lib.from_any(f"what {folder} was begun with", begun["config"])


def require_same(
  folder: pathlib.Path, config: Config, now: Mapping[str, Any]
) -> str:
  """Compares the fingerprint of a run with the fingerprint of today.

  Args:
    folder: the folder of the run. Without a checkpoint, the run starts again,
      and nothing is compared. Checkpoints of older versions have no
      fingerprint.
    config: the configuration of the run.
    now: the result of `of`.

  Returns:
    A sentence for the user on what has changed, if `--accept-changes` is set;
    empty if nothing has changed.

  Raises:
    UsageError: if something has changed without `--accept-changes`; the message
      names it.
  """
  step, then = _begun(folder)
  if not step or not then:
    return ""
  changed = [*_base_changes(config, then, now), *_changes(config, then, now)]
  if not changed:
    return ""
  found = (
    f"what {folder} was begun with has changed since step {step}: "
    f"{'; '.join(changed)}."
  )
  if config.output.accept_changes:
    return f"{found} --accept-changes: the run goes on with what is there now."
  raise UsageError(
    f"{found} Restore it, or use --accept-changes to go on with what is there "
    "now, or give another --run-dir."
  )


def require_same_base(
  folder: pathlib.Path,
  config: Config,
  then: Mapping[str, Any],
  pretrained: Pretrained,
  template: templates.Template | None,
) -> None:
  """Refuses a model that differs from the one that a run was trained on.

  Args:
    folder: the folder of the run.
    config: the configuration of the run.
    then: the fingerprint of the run.
    pretrained: the model of today.
    template: the chat template, if the run learned from conversations.

  Raises:
    UsageError: if the model has changed; the message names the change.
  """
  changed = _base_changes(config, then, _base(pretrained, template))
  if changed:
    raise UsageError(
      f"the model that {folder} was trained on has changed: "
      f"{'; '.join(changed)}. Restore it, or use --accept-changes to go on "
      "with what is there now."
    )


def read(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the fingerprint in a run's folder; empty if there is none.

  Raises:
    UsageError: if it cannot be read.
  """
  path = folder / FILE
  try:
    found = json.loads(path.read_bytes())
    if not _is_fingerprint(found):
      raise ValueError("it is not what the program writes there")
  except (FileNotFoundError, NotADirectoryError):
    return {}
  except (OSError, ValueError, RecursionError) as error:
    raise UsageError(f"{path} cannot be read: {error}.") from error
  return found


def _is_fingerprint(found: Any) -> bool:
  tables = ("model", "rows", "adapter", "plugins", "config")
  return (
    isinstance(found, dict)
    and all(isinstance(found.get(name, {}), dict) for name in tables)
    and all(
      isinstance(x, dict) and isinstance(x.get("bytes"), int)
      for name in ("model", "adapter", "plugins")
      for x in found.get(name, {}).values()
    )
  )


def _begun(folder: pathlib.Path) -> tuple[int, dict[str, Any]]:
  """Returns the last checkpoint's step, and the fingerprint of the run."""
  for step, found in checkpoints.stored(folder / checkpoints.FOLDER):
    return step, found.get("begun") or {}
  return 0, read(folder)


def _base(
  pretrained: Pretrained, template: templates.Template | None
) -> dict[str, Any]:
  path = pretrained.path
  stored = [path]
  if path.is_dir():
    names = ["config.json", *_TOKENIZER]
    if not (path / _OWN_TOKENIZER).is_file():
      names += [name for name in vocabulary.FILES if name not in names]
    stored = [*(path / name for name in names), *tensors.files(path)]
  told = template and "\n".join(dataclasses.astuple(template))
  return {
    "commit": weights.commit(path),
    "model": _files(stored),
    "template": _digest(told.encode()) if told else None,
    "pooling": getattr(pretrained.config, "pooling", None),
  }


def _files(paths: list[pathlib.Path]) -> dict[str, Any]:
  """Returns the size and digest of each file that exists, by name."""
  paths = [path for path in paths if path.is_file()]
  whole = sum(path.stat().st_size for path in paths) <= _WHOLE
  return {path.name: _file(path, whole) for path in paths}


def _file(path: pathlib.Path, whole: bool) -> dict[str, Any]:
  size, found = path.stat().st_size, hashlib.sha256()
  with path.open("rb") as file:
    if path.name == "tokenizer_config.json":
      text = _without_template(file.read())
      found.update(text)
      size = len(text)
    elif whole or size <= _HEAD or path.name in _TOKENIZER:
      found.update(file.read())
    else:
      head = file.read(_HEAD)
      found.update(head)
      for place in _places(path, size, head):
        file.seek(place)
        found.update(file.read(_SAMPLE))
  return {"bytes": size, "digest": found.hexdigest()[:16]}


def _places(path: pathlib.Path, size: int, head: bytes) -> list[int]:
  """Returns the places where a large file is sampled."""
  found = np.linspace(0, size - _SAMPLE, _SAMPLES).astype(int).tolist()
  length = int.from_bytes(head[:8], "little") + 8
  if path.suffix == ".safetensors" and length <= len(head):
    header = json.loads(head[8:length])
    starts = [
      length + entry["data_offsets"][0]
      for name, entry in header.items()
      if name != "__metadata__"
    ]
    found += sorted(starts)[:: len(starts) // _MOST_TENSORS + 1]
  return found


def _without_template(text: bytes) -> bytes:
  """Returns a tokenizer_config.json without its template.

  The template has its own digest if the run uses it.
  """
  try:
    found = json.loads(text)
    found.pop("chat_template", None)
  except (ValueError, AttributeError, RecursionError):
    return text
  return json.dumps(found, sort_keys=True).encode()


def _plugins(config: Config) -> Iterator[pathlib.Path]:
  """Yields the files of --plugins."""
  names = filter(None, map(str.strip, config.plugins.plugins.split(",")))
  for name in names:
    if name.endswith(".py"):
      yield pathlib.Path(name)
    elif name in sys.modules:
      yield pathlib.Path(getattr(sys.modules[name], "__file__", None) or name)
    else:
      spec = importlib.util.find_spec(name)
      yield pathlib.Path(spec.origin if spec and spec.origin else name)


def _rows(data: data_lib.Data) -> dict[str, Any]:
  """Returns each split's number of rows and a digest of the encoded rows."""
  encoded = (
    data.packed
    if isinstance(data, data_lib.Conversations)
    else data.examples
    if isinstance(data, data_lib.Labelled)
    else {}
  )
  found = {}
  for split, rows in encoded.items():
    digest = hashlib.sha256()
    for name, value in _leaves(rows):
      digest.update(name.encode())
      if isinstance(value, np.ndarray):
        digest.update(str((value.dtype, value.shape)).encode())
        digest.update(np.ascontiguousarray(value).data.cast("B"))
      else:
        digest.update(repr(value).encode())
    found[split] = {
      "count": data.rows[split],
      "digest": digest.hexdigest()[:16],
    }
  return found


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
  for field in dataclasses.fields(value):
    inner = getattr(value, field.name)
    if dataclasses.is_dataclass(inner):
      yield from _leaves(inner)
    else:
      yield field.name, inner


def _base_changes(
  config: Config, then: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
  """Returns a phrase for each change of the model."""
  name, found = config.model.name, []
  commits = then.get("commit"), now["commit"]
  if all(commits) and commits[0] != commits[1]:
    found.append(
      f"the commit of --model {name} on the hub (it was {commits[0]}, and is "
      f"{commits[1]})"
    )
  found += _of_files(then.get("model", {}), now["model"], f"--model {name}")
  pooled = then.get("pooling", now["pooling"])  # older versions have no pooling
  if pooled != now["pooling"]:
    found.append(
      f"the pooling of --model {name} (it was {pooled}, and is "
      f"{now['pooling']})"
    )
  if then.get("template") != now["template"]:
    given = config.data.chat_template
    where = f"--chat-template {given}" if given else f"--model {name}"
    found.append(f"the chat template of {where}")
  return found


def _changes(
  config: Config, then: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
  """Returns a phrase for each change except those of the model."""
  folder = f"--adapter {config.adapter.path}"
  found = _of_files(then.get("adapter", {}), now["adapter"], folder)
  # A run stays the same if --plugins names other files, such as loggers.
  both = then.get("plugins", {}).keys() & now["plugins"].keys()
  old, new = ({name: x["plugins"][name] for name in both} for x in (then, now))
  found += _of_files(old, new, "--plugins")
  if then.get("labels") != now["labels"]:
    found.append(f"the labels of {_source(config, 'train')}")
  # Another tokenizer or template changes the encoded rows too.
  encoder = then.get("template") != now["template"] or any(
    then["model"].get(name) != now["model"].get(name)
    for name in (*_TOKENIZER, *vocabulary.FILES, *_single(then, now))
  )
  for split, rows in now["rows"].items():
    old = then.get("rows", {}).get(split, {})
    if old.get("count") != rows["count"] or (old != rows and not encoder):
      counts = f" ({old.get('count')} then, {rows['count']} now)"
      same = old.get("count") == rows["count"]
      source = _source(config, split)
      found.append(f"the {split} rows of {source}{'' if same else counts}")
  return found


def _single(*fingerprints: Mapping[str, Any]) -> list[str]:
  """Returns the file of each model that is a single file with a tokenizer."""
  every = [list(x["model"]) for x in fingerprints]
  return [names[0] for names in every if len(names) == 1]


def _of_files(
  then: Mapping[str, Any], now: Mapping[str, Any], where: str
) -> list[str]:
  found = []
  for name in {**then, **now}:
    old, new = then.get(name), now.get(name)
    if old == new:
      continue
    how = "is gone" if new is None else "is new" if old is None else ""
    if old and new and old["bytes"] != new["bytes"]:
      how = f"{old['bytes']:,} bytes then, {new['bytes']:,} now"
    found.append(f"{name} of {where}" + (f" ({how})" if how else ""))
  return found


def _source(config: Config, split: str) -> str:
  own = getattr(config.data, split, "") if split != "train" else ""
  if own:
    return f"--{split} {own}"
  if config.data.path:
    return f"--data {config.data.path}"
  return f"--task {config.data.task}"


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]
