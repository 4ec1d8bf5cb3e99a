"""The tables of a study, in Markdown; they depend only on its rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data import calibration
from . import estimates
from .estimates import Estimate
from .results import Result
from .spec import Recovery, Study

DIRECTIONS = {
  ("full", "one_step"): "one step along the gradient, merged weights",
  ("full", "low_rank"): "the worst low-rank step, merged weights",
  ("full", "average"): "the mean of random directions, merged weights",
  ("lora", "one_step"): "one step along the gradient, primary's factors",
}
"""From the place of a measurement in a row to its title."""

_UNITS = {"perplexity": (1.0, "")}


def unit(metric: str) -> tuple[float, str]:
  """Returns the factor of a metric in tables, and the unit after its name."""
  return _UNITS.get(metric, (100.0, ", %"))


def metric(results: Mapping[str, Result]) -> str:
  """Returns the metric of a task; "score" if there is no row yet."""
  for result in results.values():
    rows = [*result.finals.values(), *(r for _, t in result.trials for r in t)]
    for row in rows:
      return row["metric"]
  return "score"


def accuracy(study: Study, results: Mapping[str, Result]) -> list[str]:
  """Returns each method's test metric, and its difference to the reference."""
  name = metric(results)
  factor, sign = unit(name)
  reference = results.get(study.reference)
  others = [label for label in results if label != study.reference]
  paired = {
    label: [] if reference is None else gains(results[label], reference, name)
    for label in others
  }
  flips = [estimates.sign_flip(paired[label]) for label in others]
  corrected = dict(zip(others, estimates.holm(flips)))
  raw = dict(zip(others, flips))
  time = None if reference is None else _mean(reference.of("step_seconds"))

  def cells(label: str, result: Result) -> list[str]:
    differences = paired.get(label, [])
    own = _mean(result.of("step_seconds"))
    return [
      _count(result),
      estimate(_mean(result.of("test", name)), factor, 2),
      estimate(estimates.mean(differences), factor, 2, signed=True),
      p_value(raw.get(label)),
      p_value(corrected.get(label)),
      p_value(estimates.wilcoxon(differences)),
      estimate(_mean(result.of("validation", "best", name)), factor, 2),
      estimate(_mean(loss(result)), 1.0, 4),
      _number(_mean(result.of("gradients_per_step")), 2),
      "" if not (time and own) else f"{own.mean / time.mean:.2f}",
    ]

  heads = [
    "method",
    "n",
    f"test {_words(name)}{sign}",
    f"difference{', points' if sign else ''}",
    "p",
    "p, Holm",
    "p, Wilcoxon",
    f"validation{sign}",
    "training loss",
    "gradients a step",
    "step time",
  ]
  return _table(heads, results, cells)


def after(study: Study, results: Mapping[str, Result]) -> list[list[str]]:
  """Returns the tables of the tests after training; none if there were none.

  Returns:
    the table of accuracies, the table of their differences to the reference,
    and the table of the scores of the test rows' probabilities.
  """
  names: dict[str, None] = {}
  for result in results.values():
    for row in result.finals.values():
      names |= dict.fromkeys(row.get("after", {}))
  if not names:
    return []
  reference = results.get(study.reference)

  def accuracies(label: str, result: Result) -> list[str]:
    found = [_mean(result.of("after", x, "accuracy")) for x in names]
    return [_count(result), *(estimate(x, 100.0, 2) for x in found)]

  def differences(label: str, result: Result) -> list[str]:
    if reference is None or label == study.reference:
      return ["" for _ in names]
    cells = []
    for name in names:
      paired = estimates.differences(
        result.of("after", name, "accuracy"),
        reference.of("after", name, "accuracy"),
      )
      shown = estimate(estimates.mean(paired), 100.0, 2, signed=True)
      p = p_value(estimates.sign_flip(paired))
      cells.append(f"{shown} ({p})" if p else shown)
    return cells

  def probabilities(label: str, result: Result) -> list[str]:
    return [
      estimate(_mean(result.of("after", "test", name)), 1.0, 4)
      for name in calibration.SCORES
    ]

  return [
    _table(["method", "n", *names], results, accuracies),
    _table(["method", *names], results, differences),
    _table(["method", *calibration.SCORES.values()], results, probabilities),
  ]


def loss(result: Result) -> dict[int, float]:
  """Returns the training loss at the end of each run.

  It is the loss at the final weights if it was measured, and else the last
  logged loss.
  """
  return result.of("sharpness", "loss") or result.of("curves", "loss", -1, 1)


def accuracy_note(study: Study, results: Mapping[str, Result]) -> str:
  """Returns the sentences that explain the table of accuracies."""
  reference = results.get(study.reference)
  counts = sorted(
    {
      len(set(result.finals) & set(reference.finals))
      for label, result in results.items()
      if reference is not None and label != study.reference
    }
    - {0}
  )
  attainable = ", ".join(
    f"{estimates.smallest(n):.3g} with {n} pairs" for n in counts
  )
  return (
    "± is the 95% t-interval over seeds. The difference is that to "
    f"{study.reference}, paired by the seed, over the seeds that both methods "
    "have finished. p: exact two-sided "
    "sign-flip test of the paired differences (Holm: corrected over the "
    "methods of this table), and Wilcoxon's signed-rank test, exact too"
    + (
      f"; the smallest p that the test can give is {attainable}"
      if attainable
      else ""
    )
    + (
      f". Of more than {estimates.EXACT_PAIRS} pairs {estimates.DRAWS:,} signs "
      "are drawn instead of all"
      if counts and counts[-1] > estimates.EXACT_PAIRS
      else ""
    )
    + ". The training loss is that at the end, in nats, "
    + (
      f"at the weights alone, on {study.sharpness.rows} training rows. "
      if study.sharpness
      else "the mean of the last steps, as they met it. "
    )
    + f"The step time is over that of {study.reference}; workers share a "
    "machine, so a benchmark is what to cite." + _tuned(results)
  )


def _tuned(results: Mapping[str, Result]) -> str:
  tuned = [label for label, result in results.items() if result.cell.grid]
  sources: dict[str, list[str]] = {}
  for label, result in results.items():
    if source := result.cell.point_of:
      name = source.label if source.task == result.cell.task else source.name
      sources.setdefault(name, []).append(label)
  told = f" Tuned: {'; '.join(tuned)}." if tuned else ""
  for name, labels in sources.items():
    told += f" With the point that won for {name}: {'; '.join(labels)}."
  count = len(tuned) + sum(map(len, sources.values()))
  if count in (0, len(results)):
    return told if sources else ""
  return f"{told} The others have the numbers that the study gives them."


def sharpness(
  study: Study, results: Mapping[str, Result], space: str, direction: str
) -> list[str]:
  """Returns a table of the training loss's rise at each radius, in nats.

  Returns:
    The lines of the table; no lines if nothing was to be measured.
  """
  options = study.sharpness
  if options is None or space not in options.spaces:
    return []
  if not getattr(options, direction, True):
    return []

  def cells(label: str, result: Result) -> list[str]:
    found = [rises(result, space, direction, i) for i in range(len(radii))]
    if space == "lora" and result.finals and not any(found):
      return [_count(result), *["—"] * len(radii)]
    return [_count(result), *(rise(x, len(result.finals)) for x in found)]

  def rise(found: Mapping[int, float], count: int) -> str:
    shown = estimate(_mean(found), 1.0, None)
    lacking = count - len(found)
    return shown + (f" ({lacking} not finite)" if lacking else "")

  radii = options.radii
  heads = ["method", "n", *(f"radius {radius:g}" for radius in radii)]
  return _table(heads, results, cells)


def sharpness_differences(
  study: Study, results: Mapping[str, Result], space: str, direction: str
) -> list[str]:
  """Returns a table of each method's rise minus the reference's, in pairs.

  Returns:
    The lines of the table; no lines if nothing was to be measured, or there is
    no pair of runs with the same seed yet.
  """
  options, reference = study.sharpness, results.get(study.reference)
  if options is None or reference is None or space not in options.spaces:
    return []

  def differences(result: Result) -> list[list[float]]:
    return [
      estimates.differences(
        rises(result, space, direction, place),
        rises(reference, space, direction, place),
      )
      for place in range(len(options.radii))
    ]

  def cells(label: str, result: Result) -> list[str]:
    found = differences(result)
    return [
      str(len(found[0])),
      *(
        f"{estimate(estimates.mean(x), 1.0, None, signed=True)} "
        f"({p_value(estimates.sign_flip(x))})"
        if x
        else ""
        for x in found
      ),
    ]

  heads = ["method", "n", *(f"radius {radius:g}" for radius in options.radii)]
  others = {
    label: result
    for label, result in results.items()
    if label != study.reference and any(differences(result))
  }
  return _table(heads, others, cells) if others else []


def rises(
  result: Result, space: str, direction: str, place: int
) -> dict[int, float]:
  """Returns the rise of the loss at a radius, by seed."""
  return result.of("sharpness", space, direction, "rise", place)


def shares(
  study: Study, results: Mapping[str, Result], recovery: Recovery
) -> list[str]:
  """Returns a table of each method's recovered share at each radius."""
  options = study.sharpness
  if options is None or "full" not in options.spaces:
    return []
  ends = recovery.start, recovery.reference, recovery.target
  if not set(ends) <= set(results):
    return []

  def found(result: Result) -> list[estimates.Share | None]:
    methods = (results[ends[0]], result, results[ends[1]], results[ends[2]])
    return [
      estimates.recovered(
        *(rises(x, "full", "one_step", place) for x in methods)
      )
      for place in range(len(options.radii))
    ]

  def cells(label: str, result: Result) -> list[str]:
    of_radii = found(result)
    count = next((share.seeds for share in of_radii if share), 0)
    return [str(count), *map(_share, of_radii)]

  heads = ["method", "n", *(f"radius {radius:g}" for radius in options.radii)]
  others = {
    label: result
    for label, result in results.items()
    if label not in ends and any(found(result))
  }
  return _table(heads, others, cells) if others else []


def shares_note(recovery: Recovery) -> str:
  """Returns the sentences that explain a recovered share."""
  one, other, own = recovery.reference, recovery.target, recovery.start
  scale = (
    f"0 means as sharp as {one}, and 1 as flat as {other}"
    if one == own
    else f"0 means as sharp as {own}, and 1 flatter than {own} by as much as "
    f"{other} is flatter than {one}"
  )
  return (
    f"(S of {own} - S of the method) / (S of {one} - S of {other}), of means "
    "over the seeds that all have, with S the rise after one step along "
    f"the gradient in merged weights: {scale}. 95%: percentile bootstrap over "
    f"seeds, {estimates.RESAMPLES:,} "
    "resamples with seed 0. *Not defined*: the sharpness of "
    f"{other} is not below that of {one}, by the 95% t-interval of their "
    "paired difference; the ratio of the means is given all the same."
  )


def tuning(results: Mapping[str, Result]) -> list[str]:
  """Returns a table of all points of the grids, with the winners."""
  name = metric(results)
  rows = []
  for label, result in results.items():
    for point, trials in result.trials:
      scores = [row["score"] for row in trials]
      broken = scores.count(None)
      found = estimates.mean([x for x in scores if x is not None])
      rows.append(
        [
          label,
          text(point),
          str(len(trials)),
          _number(found, 2, abs(unit(name)[0]))
          + (f" ({broken} broke off)" if broken else ""),
          "won" if point == result.point else "",
        ]
      )
  if not rows:
    return []
  return lines(
    ["method", "point", "n", f"mean validation{unit(name)[1]}", ""], rows
  )


def tuning_note(study: Study) -> str:
  """Returns the sentences that explain the budget of tuning."""
  if study.tuning is None:
    return "No method was tuned."
  seeds = ", ".join(map(str, study.tuning.seeds))
  return (
    f"Each tuned method has {study.tuning.trials} points and the seeds {seeds}"
    ", which no final run has. The point with the best mean on the validation "
    "rows wins; of equal points, the first."
  )


def text(point: Mapping[str, Any]) -> str:
  """Returns a point of a grid as a text."""
  return ", ".join(
    f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
    for name, value in point.items()
  )


def failures(results: Iterable[Result]) -> list[str]:
  """Returns a line for each run that broke off."""
  return [
    f"- {row['label']} on {row['task']}, {row['stage']}"
    + (f", {text(row['point'])}" if row["point"] else "")
    + f", seed {row['seed']}: {row['failed']}"
    for result in results
    for row in result.failed
  ]


def gains(result: Result, reference: Result, name: str) -> list[float]:
  """Returns the test metric minus the reference's, for each common seed."""
  return estimates.differences(
    result.of("test", name), reference.of("test", name)
  )


def _mean(values: Mapping[int, float]) -> Estimate | None:
  return estimates.mean(list(values.values()))


def _count(result: Result) -> str:
  count, wanted = len(result.finals), len(result.cell.seeds)
  return str(count) if count == wanted else f"{count} of {wanted}"


def estimate(
  found: Estimate | None,
  factor: float,
  digits: int | None,
  signed: bool = False,
) -> str:
  """Returns mean ± half as a text.

  If `digits` is None, the text has enough digits to show the half.
  """
  if found is None:
    return ""
  value = found.mean * factor
  half = None if found.half is None else found.half * factor
  if digits is None:
    # If all differences are equal, the width is only rounding.
    wide = half is not None and half > 1e-9 * abs(value)
    digits = _digits(min(abs(value), half or 0.0) if wide else value)
  shown = f"{value:{'+' if signed else ''}.{digits}f}"
  return shown if half is None else f"{shown} ± {half:.{digits}f}"


def _digits(value: float) -> int:
  """Returns how many decimals show two significant digits of a number."""
  if not value:
    return 2
  return int(np.clip(1 - np.floor(np.log10(abs(value))), 0, 8))


def _share(found: estimates.Share | None) -> str:
  if found is None:
    return ""
  shown = "" if found.share is None else f"{found.share:.2f}"
  if found.interval is not None:
    low, high = found.interval
    shown += f" ({low:.2f} to {high:.2f})"
  if not found.defined:
    shown += " *not defined*" if shown else "*not defined*"
  return shown


def p_value(value: float | None) -> str:
  """A p-value with three digits, or with one if it is small."""
  if value is None:
    return ""
  return f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def _number(found: Estimate | None, digits: int, factor: float = 1.0) -> str:
  if found is None:
    return ""
  return f"{found.mean * factor:.{digits}f}"


def _words(name: str) -> str:
  return name.replace("_", " ")


def _table(heads, results: Mapping[str, Result], cells) -> list[str]:
  return lines(
    heads,
    [[label, *cells(label, result)] for label, result in results.items()],
  )


def lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """The lines of a table in Markdown."""
  return [
    "| " + " | ".join(map(_escaped, heads)) + " |",
    "|" + "---|" * len(heads),
    *("| " + " | ".join(map(_escaped, row)) + " |" for row in rows),
  ]


def _escaped(cell: str) -> str:
  return cell.replace("|", "\\|")
