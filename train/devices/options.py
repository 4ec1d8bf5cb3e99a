"""Options of devices."""

import dataclasses

from ..options import option


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
  """The devices, and what is compiled for them."""

  mesh: str = option("")
  """Number of devices along each axis, for example data=2,fsdp=2,tensor=2. data
  shares rows; fsdp shares rows and weights; context shares the tokens of a row,
  and weights (for decoders); tensor shares attention heads and inner layers.
  Empty means one device."""
  compilation_cache: bool = option(True)
  """Keep compiled steps in the user's cache folder."""
