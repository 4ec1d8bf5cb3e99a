"""The families of models that the program knows."""

from collections.abc import Iterable
from typing import Any

from flax import linen as nn

from .. import options
from .bert import family as bert
from .bert import sequence as sequence_bert
from .deberta import family as deberta
from .decoder import family as decoder
from .decoder import sequence as sequence_decoder
from .family import Family
from .modernbert import family as modernbert
from .t5 import family as t5
from .vit import family as vit

OWN = (
  bert.FAMILY,
  sequence_bert.FAMILY,
  deberta.FAMILY,
  modernbert.FAMILY,
  decoder.FAMILY,
  sequence_decoder.FAMILY,
  t5.FAMILY,
  vit.FAMILY,
)
"""The program's own families."""

_families = {family.name: family for family in OWN}


def register(family: Family) -> None:
  """Adds a family, or replaces the family of the same name.

  Raises:
    ValueError: if another family opens the same models.
  """
  for other in families():
    both = {*family.model_types, family.suffix} & {
      *other.model_types,
      other.suffix,
    }
    if other.name != family.name and both - {""}:
      raise ValueError(
        f"The family {family.name} would open what {other.name} opens: "
        f"{', '.join(sorted(both - {''}))}."
      )
  _families[family.name] = family


def families() -> tuple[Family, ...]:
  """Returns all families, the program's own first."""
  return tuple(_families.values())


def family_of(model: nn.Module) -> Family:
  """Returns the family of a model.

  Raises:
    ValueError: if no registered family has models of this class.
  """
  for family in families():
    if isinstance(model, family.modules):
      return family
  raise ValueError(
    f"A {type(model).__name__} is of no registered family of models; there are "
    f"{names(families())}."
  )


def by_model_type(
  model_type: Any,
  among: Iterable[Family] | None = None,
  head: str = "own",
) -> Family:
  """Returns the family that opens folders with this `model_type`.

  Args:
    model_type: the value in config.json.
    among: the families to choose from; None: all.
    head: the value of `--head`.

  Raises:
    ValueError: if there is no such family.
  """
  among = families() if among is None else among
  known = {
    name: family
    for family in among
    for name in (family.model_types if head == "own" else family.sequence_types)
  }
  if not isinstance(model_type, str) or model_type not in known:
    raise ValueError(
      f"model_type must be one of {', '.join(known)}"
      + f" for --head {head}" * (head != "own")
      + f", got {options.shown(model_type)}."
    )
  return known[model_type]


def names(families: Iterable[Family]) -> str:
  """Returns the names of families, as a list in a sentence."""
  return ", ".join(family.name for family in families)
