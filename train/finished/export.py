"""`python -m train export`: what a run has trained, for other programs."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from flax import linen as nn
import jax
import numpy as np
import safetensors.numpy
import tyro

import bilora_jax
from bilora_jax import peft

from .. import command
from ..data import registry as tasks
from ..errors import UsageError
from ..models import hf_names, load
from ..models.vit import model as vit
from ..run import config as config_lib

# Beside the weights, what transformers makes a tokenizer of.
_TOKENIZER = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.txt",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class Options:
  """Writes a run's adapters as PEFT's, or the model with them merged.

  PEFT and transformers then compute what the run was tested with: for decoders
  the same logits; for a BERT a token classifier, whose mean over the real
  tokens is ours; for a ViT an image classifier.
  """

  run: str
  """The folder of a finished run."""
  out: str
  """The folder to write."""
  merged: bool = False
  """Write the whole model, the adapters added to its weights."""
  base_model: str = ""
  """What PEFT's readers are told that the adapters are for; empty: the run's
  model."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command. Returns 0, 1 if it cannot write, or 2 for bad usage."""
  options = tyro.cli(Options, args=argv, prog=f"{command.NAME} export")
  try:
    print(export(options))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


def export(options: Options) -> str:
  """Does it, and says what was written.

  Raises:
    ValueError: if there is no such run, it trained no adapters, or they cannot
      be written so.
    OSError: if a file cannot be written.
  """
  folder = pathlib.Path(options.run)
  run = config_lib.from_run(folder)
  saved = folder / "adapters"
  if not saved.is_dir():
    raise UsageError(
      f"{folder} has no adapters: they are written when a run has ended, of a "
      f"--method that has any; this is a run of --method {run.method.name}."
    )
  out = pathlib.Path(options.out)
  if options.merged and out.exists():
    _check_empty(out)
  pretrained = load.open_pretrained(run.model.name)
  labels = _labels(run, pretrained)
  model = _model(run, pretrained, labels)
  kind = hf_names.kind(model)
  adapted = bilora_jax.adapt(
    model, bilora_jax.load_spec(saved), *_inputs(pretrained)
  )
  adapters = bilora_jax.load_adapters(saved, adapted)
  if options.merged:
    params = _merged(run, pretrained, model, adapted, adapters)
    tensors = hf_names.tensors(model, params)
    config = _config(pretrained, kind, labels, tensors)
    _write_model(out, tensors, config, pretrained)
    return f"{out} is a {kind.architecture} of transformers."
  peft.save(
    out,
    adapted,
    adapters,
    kind.names,
    base_model=options.base_model or _source(run.model.name, pretrained),
    task_type=kind.task_type,
    # A run that keeps its second adapter was asked to.
    auxiliary="auxiliary" in adapters,
  )
  return f"{out} is a LoRA of PEFT, for a {kind.architecture}."


def _check_empty(out: pathlib.Path) -> None:
  if not out.is_dir() or any(out.iterdir()):
    raise UsageError(
      f"--out is a new or an empty folder for a whole model; got {out}, where "
      "something is."
    )


def _labels(
  run: config_lib.Config, pretrained: load.Pretrained
) -> tuple[str, ...]:
  """Of an encoder's head; a decoder and a T5 have none."""
  if pretrained.is_decoder or pretrained.is_t5:
    return ()
  return tasks.get(run.data.task).labels


def _model(
  run: config_lib.Config, pretrained: load.Pretrained, labels: Sequence[str]
) -> nn.Module:
  if pretrained.is_decoder:
    # A run's adapters are stacked where its layers were.
    return pretrained.language_model(
      scan=run.model.scan_layers, param_dtype=run.model.param_dtype
    )
  if pretrained.is_t5:
    return pretrained.t5(
      scan=run.model.scan_layers, param_dtype=run.model.param_dtype
    )
  return pretrained.encoder_classifier(len(labels))


def _inputs(pretrained: load.Pretrained) -> tuple[Any, ...]:
  sizes = pretrained.config
  if isinstance(sizes, vit.VitConfig):
    side = sizes.patch_size * sizes.grid
    return (jax.ShapeDtypeStruct((1, side, side, 3), "float32"),)
  # A decoder's tokens; an encoder's mask too; and a T5's targets.
  count = 1 if pretrained.is_decoder else 3 if pretrained.is_t5 else 2
  return (jax.ShapeDtypeStruct((1, 2), "int32"),) * count


def _merged(
  run: config_lib.Config,
  pretrained: load.Pretrained,
  model: nn.Module,
  adapted: bilora_jax.Adapted,
  adapters: Mapping[str, Any],
) -> Mapping[str, Any]:
  if "auxiliary" in adapters:
    raise UsageError(
      f"the run kept both adapters of {run.method.name}, and --merged merges "
      "one; write them without it, and merge them with PEFT."
    )
  variables = pretrained.variables(model, 0, run.model.param_dtype)
  if adapted.spec.base_dtype is not None:
    # As the run saw them: the adapters make up for the rounding.
    variables = adapted.quantize(variables, donate=True)
  return adapted.merge(variables, adapters)["params"]


def _config(
  pretrained: load.Pretrained,
  kind: hf_names.Kind,
  labels: Sequence[str],
  tensors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """The config.json of what is written."""
  config = {
    **pretrained.hf_config,
    "architectures": [kind.architecture],
    # That of the layers; a head may be wider.
    "torch_dtype": next(iter(tensors.values())).dtype.name,
  }
  if pretrained.is_t5:
    # Newer files of transformers say so of every T5.
    config["tie_word_embeddings"] = hf_names.is_tied(tensors)
  for gone in ("dtype", "quantization_config", "_name_or_path", "num_labels"):
    config.pop(gone, None)
  if labels:
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    config["label2id"] = {label: i for i, label in enumerate(labels)}
  return config


def _write_model(
  out: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  config: Mapping[str, Any],
  pretrained: load.Pretrained,
) -> None:
  """Makes the folder at once, when all is on the disk."""
  out.parent.mkdir(parents=True, exist_ok=True)
  part = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
  try:
    safetensors.numpy.save_file(
      {name: np.ascontiguousarray(x) for name, x in tensors.items()},
      part / "model.safetensors",
      metadata={"format": "pt"},
    )
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(part, pretrained)
    part.chmod(0o777 & ~_umask())  # mkdtemp's are for the owner alone
    os.replace(part, out)
  except BaseException:
    with contextlib.suppress(OSError):
      shutil.rmtree(part)
    raise


def _write_tokenizer(out: pathlib.Path, pretrained: load.Pretrained) -> None:
  if pretrained.path.is_dir():
    for name in _TOKENIZER:
      if (pretrained.path / name).is_file():
        shutil.copyfile(pretrained.path / name, out / name)
  elif pretrained.text_tokenizer is not None:
    pretrained.text_tokenizer.save(str(out / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if pretrained.template is not None:
      template = pretrained.template
      config["chat_template"] = template.source
      config |= {"bos_token": template.bos or None}
      config |= {"eos_token": template.eos or None}
    text = json.dumps(config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text)


def _source(name: str, pretrained: load.Pretrained) -> str:
  """A hub's name as it is, for all who read it; else where the model is."""
  path = pretrained.path
  is_local = pathlib.Path(name).expanduser().exists()
  return name if "/" in name and not is_local else str(path.absolute())


def _umask() -> int:
  # There is no other way to read it.
  mask = os.umask(0)
  os.umask(mask)
  return mask
