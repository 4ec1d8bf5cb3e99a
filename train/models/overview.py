"""Makes the table of docs/models.md from the registry.

python -m train.models.overview
"""

from .family import Family
from .registry import OWN

_HEADS = (
  "`model_type`",
  "reads",
  "a classifier answers by",
  "generates",
  "one layer compiled for all",
  "PEFT folders, and whole models for transformers",
  "`--head sequence`",
)
_ANSWERS = {
  "head": "a new head",
  "token": "the first token of a label's word",
  "words": "all tokens of a label's word",
}


def table() -> str:
  """Returns a Markdown table with a row for each kind of model."""
  sequence = {x for family in OWN for x in family.sequence_types}
  rows = [_HEADS, ("---",) * len(_HEADS)]
  for family in OWN:
    rows += [
      (f"`{kind}`", *_cells(family), _yes(kind in sequence))
      for kind in family.model_types
    ]
    if family.suffix:
      rows.append((f"a file {family.suffix}", *_cells(family), "no"))
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(family: Family) -> tuple[str, ...]:
  return (
    family.reads,
    _ANSWERS[family.answers],
    _yes(family.generate is not None),
    _yes(family.scans),
    _yes(family.kind is not None and family.tensors is not None),
  )


def _yes(value: bool) -> str:
  return "yes" if value else "no"


if __name__ == "__main__":
  print(table())
