"""Options of devices."""

import dataclasses

from ..options import option


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
  """The devices, and what is compiled for them."""

  mesh: str = option("")
  """Devices along data, fsdp (rows and weights), context (the tokens of a row,
  and weights; decoders) and tensor (heads and inner layers), as
  data=2,fsdp=2,tensor=2; empty: one device."""
  compilation_cache: bool = option(True)
  """Keep compiled steps in the user's cache folder."""
