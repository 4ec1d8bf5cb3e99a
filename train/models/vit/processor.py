"""Reads preprocessor_config.json: the size and normalisation of images."""

import dataclasses
import pathlib
from typing import Any

from ... import checked, options
from .config import CHANNELS, VitConfig

FILE = "preprocessor_config.json"
# The first key that the file has is used: the size of the crop, before the size
# of the resized image.
_SIDES = ("crop_size", "size")
_KEYS = ("height", "shortest_edge")


def with_images(config: VitConfig, folder: pathlib.Path) -> VitConfig:
  """Returns a configuration with the size and normalisation of the images.

  If the folder has no preprocessor_config.json, the images have the side for
  which positions were learned, and ImageNet's mean and standard deviation.

  Args:
    config: the configuration of the folder's model.
    folder: the model's folder.

  Raises:
    ValueError: if the file is invalid.
  """
  path = folder / FILE
  if not checked.is_file(path):
    return dataclasses.replace(config, side=config.grid * config.patch_size)
  found = checked.read_json(path)
  # Pixels after the last whole patch are left out.
  side = _side(path, found) or config.grid * config.patch_size
  side = max(1, side // config.patch_size) * config.patch_size
  if not checked.truth(found, "do_normalize", True):
    zeros, ones = (0.0,) * CHANNELS, (1.0,) * CHANNELS
    return dataclasses.replace(config, side=side, mean=zeros, deviation=ones)
  return dataclasses.replace(
    config,
    side=side,
    mean=_channels(path, found, "image_mean", config.mean),
    deviation=_channels(path, found, "image_std", config.deviation),
  )


def _side(path: pathlib.Path, found: dict[str, Any]) -> int:
  """Returns the side of the square, in pixels; 0 if the file has none."""
  for name in _SIDES:
    if name == "crop_size" and not checked.truth(found, "do_center_crop", True):
      continue
    value = found.get(name)
    if isinstance(value, dict):
      value = next((value[key] for key in _KEYS if key in value), None)
    if value is None:
      continue
    if not options.fits(value, int) or value < 1:
      raise ValueError(
        f"{path}: {name} must have a positive number of pixels, got "
        f"{options.shown(found[name])}."
      )
    return value
  return 0


def _channels(
  path: pathlib.Path,
  found: dict[str, Any],
  name: str,
  default: tuple[float, ...],
) -> tuple[float, ...]:
  values = found.get(name)
  if values is None:
    return default
  wanted = options.fits(values, list) and len(values) == CHANNELS
  if not wanted or not all(options.fits(x, float) for x in values):
    raise ValueError(
      f"{path}: {name} must be a list of {CHANNELS} numbers, got "
      f"{options.shown(values)}."
    )
  if name == "image_std" and min(values) <= 0:
    raise ValueError(
      f"{path}: {name} must be positive, got {options.shown(values)}."
    )
  return tuple(map(float, values))
