"""Decoders that read images too: which part of their files is about texts.

The part for images is neither read nor trained; an export carries it along.
"""

from collections.abc import Mapping
import re
from typing import Any

from ... import options

PREFIX = "model.language_model."
"""Of the names of the tensors that read texts."""

# Of those that read images.
_IMAGES = re.compile(
  r"(model\.)?(vision_tower|multi_modal_projector|visual)\..*"
)
_HEAD = "lm_head."
# Names that older files have -> theirs; the first that fits.
_OLD_PREFIXES = {
  PREFIX: PREFIX,
  "language_model.model.": PREFIX,
  "language_model.lm_head.": _HEAD,
  "language_model.": PREFIX,
  "model.": PREFIX,
}
# A position of a text is three equal ones, so that its angles are the plain.
_PLAIN = ("mrope", "default")
_ROPES = ("rope_scaling", "rope_parameters")


def texts(
  kind: str, config: Mapping[str, Any], tied: bool = False
) -> dict[str, Any]:
  """The part of a config.json that is about texts.

  Args:
    kind: its `model_type`.
    config: it. Older files have the part among the rest.
    tied: whether the head is the embedding where the file does not say.

  Raises:
    ValueError: the part is no object, or its rotary parameters are none.
  """
  part = config.get("text_config", config)
  if not options.fits(part, dict):
    raise ValueError(
      f"text_config must be an object, got {options.shown(part)}."
    )
  found = {
    **part,
    "model_type": kind,
    "tie_word_embeddings": config.get(
      "tie_word_embeddings", part.get("tie_word_embeddings", tied)
    ),
  }
  for key in _ROPES:
    rope = found.get(key)
    if isinstance(rope, dict) and "mrope_section" in rope:
      kind_of_rope = rope.get("rope_type", rope.get("type", "default"))
      if kind_of_rope in _PLAIN:
        rest = {key: x for key, x in rope.items() if key == "rope_theta"}
        found[key] = {"rope_type": "default", **rest}
  return found


def are_read_by(name: str) -> bool:
  """Whether a tensor of that name reads images."""
  return _IMAGES.fullmatch(name) is not None


def new_name(name: str) -> str:
  """The name that transformers 5 gives a tensor, of whatever age its name."""
  if are_read_by(name):
    return name if name.startswith("model.") else f"model.{name}"
  if name.startswith(_HEAD):
    return name
  for old, new in _OLD_PREFIXES.items():
    if name.startswith(old):
      return new + name.removeprefix(old)
  return PREFIX + name
