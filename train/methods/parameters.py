"""Fine-tuning without adapters: all parameters, or the new head alone."""

from .spec import MethodSpec

SPECS = (
  MethodSpec(name="full", summary="all parameters", trains="parameters"),
  MethodSpec(name="head", summary="the new head alone", trains="head"),
)
