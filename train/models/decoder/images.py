"""Decoders that also read images: finds the part of their files for texts.

The part for images is not trained. An export copies it unchanged.
"""

from collections.abc import Mapping
import re
from typing import Any

from ... import options

PREFIX = "model.language_model."
"""The prefix of the names of tensors that read texts."""

# The names of tensors that read images.
_IMAGES = re.compile(
  r"(model\.)?(vision_tower|multi_modal_projector|visual)\..*"
)
_HEAD = "lm_head."
# Prefixes of older files -> the new prefix; the first prefix that fits is used.
_OLD_PREFIXES = {
  PREFIX: PREFIX,
  "language_model.model.": PREFIX,
  "language_model.lm_head.": _HEAD,
  "language_model.": PREFIX,
  "model.": PREFIX,
}
# In texts, the three positions of these types are equal, so that the angles are
# those of plain rotary positions.
_PLAIN = ("mrope", "default")
_ROPES = ("rope_scaling", "rope_parameters")


def texts(
  kind: str, config: Mapping[str, Any], tied: bool = False
) -> dict[str, Any]:
  """Returns the part of a config.json for texts.

  Args:
    kind: the `model_type`.
    config: the config.json. Older files do not separate the part.
    tied: whether the head is the embedding, if the file does not say.

  Raises:
    ValueError: the part is not an object.
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
  """Returns transformers 5's name of a tensor, from a name of any version."""
  if are_read_by(name):
    return name if name.startswith("model.") else f"model.{name}"
  if name.startswith(_HEAD):
    return name
  for old, new in _OLD_PREFIXES.items():
    if name.startswith(old):
      return new + name.removeprefix(old)
  return PREFIX + name
