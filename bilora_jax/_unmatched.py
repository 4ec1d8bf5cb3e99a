"""Refuses a spec that names modules that the model does not have."""

from collections.abc import Iterable, Sequence
import difflib

from bilora_jax._spec import LoraSpec

_SHOWN = 8
_NEAR = 0.6


def check(
  spec: LoraSpec, adaptable: Iterable[str], modules: Iterable[str]
) -> None:
  """Refuses targets and an `exclude` that match no module.

  Each entry of a sequence and each key of a mapping has to match a module, even
  if the module is excluded, or an earlier key matches it too.

  Args:
    spec: the spec of `adapt`.
    adaptable: paths of the modules that could have adapters.
    modules: paths of all modules that have parameters.

  Raises:
    ValueError: if a target or `exclude` matches no module; the message names
      it, and lists modules that it could match, similar names first.
  """
  adaptable, modules = set(adaptable), set(modules)
  targets = spec.targets
  keys = [targets] if isinstance(targets, str) else list(targets)
  missing = [
    key for key in keys if not any(spec.is_target(key, x) for x in adaptable)
  ]
  if missing:
    named = ", ".join(map(repr, missing))
    raise ValueError(
      (
        f"targets={targets!r} match no module"
        if missing == keys
        else f"of targets={targets!r}, {named} match no module"
      )
      + f"; these could be adapted: {listed(adaptable, missing)}."
    )
  if spec.exclude is not None and not any(map(spec.is_excluded, modules)):
    raise ValueError(
      f"exclude={spec.exclude!r} matches no module; there are "
      f"{listed(modules, [spec.exclude])}."
    )


def listed(names: Iterable[str], keys: Sequence[str] = ()) -> str:
  """Up to eight names for a sentence, names similar to a key first.

  Args:
    names: paths of modules or parameters, in any order.
    keys: the spec's entries that match none of them.
  """
  paths = sorted(set(names))

  def unlike(path: str) -> float:
    parts = path.split("/")
    ratios = (
      difflib.SequenceMatcher(None, key, "/".join(parts[-n:])).ratio()
      for key in keys
      for n in range(1, len(parts) + 1)
    )
    nearest = max(ratios, default=0.0)
    return -nearest if nearest >= _NEAR else 0.0

  shown = ", ".join(map(repr, sorted(paths, key=unlike)[:_SHOWN]))
  more = f", ... ({len(paths)} in all)" if len(paths) > _SHOWN else ""
  return shown + more if paths else "none"
