"""Refuses folders whose weights other programs have quantised."""

from collections.abc import Iterable, Mapping
import pathlib
import re
from typing import Any

from . import weights

# Ends of tensors' names, and who writes them.
_ENDS = {
  "bitsandbytes": re.compile(
    r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB"
    r"|quant_state(\..*)?)"
  ),
  "GPTQ": re.compile(r".*\.g_idx"),
  "AWQ or its like": re.compile(r".*\.(qweight|qzeros)"),
}


def refuse_config(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Refuses a folder whose config.json says so.

  Raises:
    WeightsError: if it has a `quantization_config`.
  """
  found = config.get("quantization_config")
  if found:
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    # Before it had a name, there was one.
    _refuse(
      folder, method or "bitsandbytes", "its config.json: quantization_config"
    )


def refuse_tensors(folder: pathlib.Path, names: Iterable[str]) -> None:
  """Refuses a folder whose tensors' names say so.

  Raises:
    WeightsError: if they are those of quantised weights.
  """
  for method, ends in _ENDS.items():
    found = [name for name in names if ends.fullmatch(name)]
    if found:
      _refuse(folder, method, f"tensors: {weights.listed(found, ', ', 3)}")


def _refuse(folder: pathlib.Path, method: str, sign: str) -> None:
  raise weights.WeightsError(
    f"{folder} is a folder that holds weights quantised by {method} ({sign}), "
    "which cannot be read here. Give the model as it was before: --base-dtype "
    "nf4, int8 or fp8 quantises it as it is read."
  )
