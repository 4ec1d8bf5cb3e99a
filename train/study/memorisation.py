"""Compares methods at equal training loss.

A method that keeps the training loss higher memorises fewer wrong labels,
whether its minimum is flat or not. A comparison after equal numbers of steps
would mix these two effects.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from . import estimates, plots, tables
from .results import Result, Row
from .spec import Study

Results = Mapping[str, Result]


class Trajectory(NamedTuple):
  """The losses and scores of a run, at each of its validations.

  Attributes:
    loss: the mean training loss of the steps since the previous validation, in
      nats, at the weights where the method computed it.
    score: the score of the validation rows.
  """

  loss: np.ndarray
  score: np.ndarray


def trajectory(row: Row, metric: str) -> Trajectory | None:
  """Returns the validations of a run; None if fewer than two were logged."""
  curves = row.get("curves") or {}
  found = curves.get(f"validation_{metric}") or []
  losses = [x for x in curves.get("loss") or [] if x[1] is not None]
  if len(found) < 2 or not losses:
    return None
  steps, values = np.asarray(losses, np.float64).T
  ends = np.asarray([step for step, _ in found])
  means = []
  for start, end in zip([0, *ends], ends):
    of_part = values[(steps > start) & (steps <= end)]
    if not len(of_part):
      return None
    means.append(of_part.mean())
  return Trajectory(
    np.asarray(means), np.asarray([value for _, value in found], np.float64)
  )


def at_loss(run: Trajectory, level: float) -> float:
  """Returns the score where the training loss first falls to a level.

  The score is interpolated between two validations.

  Args:
    run: a run whose lowest loss is at most `level`.
    level: the level of the loss, in nats.
  """
  lowest = np.minimum.accumulate(run.loss)
  after = int(np.argmax(lowest <= level))
  if after == 0:
    return float(run.score[0])
  # The loss crosses the level between these two validations.
  pair = slice(after - 1, after + 1)
  losses = (lowest[after - 1], lowest[after])
  return float(np.interp(-level, [-x for x in losses], run.score[pair]))


class Paired(NamedTuple):
  """A method and the reference at a training loss that both reach.

  For each seed, this level is the higher one of the two runs' lowest losses.

  Attributes:
    level: the mean level over seeds.
    reference: the reference's mean score at the levels.
    score: the method's mean score at the levels.
    differences: for each seed, the method's score minus the reference's.
  """

  level: float
  reference: float
  score: float
  differences: list[float]


def paired(result: Result, reference: Result, metric: str) -> Paired | None:
  """Compares a method with the reference; None without a common seed."""
  found = []
  for seed in sorted(result.finals.keys() & reference.finals.keys()):
    runs = [trajectory(x.finals[seed], metric) for x in (result, reference)]
    own, other = runs
    if own is None or other is None:
      continue
    level = max(own.loss.min(), other.loss.min())
    found.append((level, at_loss(other, level), at_loss(own, level)))
  if not found:
    return None
  levels, others, scores = np.asarray(found).T
  return Paired(
    float(levels.mean()),
    float(others.mean()),
    float(scores.mean()),
    list(scores - others),
  )


def table(study: Study, results: Results) -> list[str]:
  """Returns the scores at equal training loss, as a Markdown table.

  The list is empty if there are no curves.
  """
  metric = tables.metric(results)
  factor, sign = tables.unit(metric)
  reference = results.get(study.reference)
  if reference is None:
    return []
  found = {
    label: comparison
    for label, result in results.items()
    if label != study.reference
    and (comparison := paired(result, reference, metric)) is not None
  }
  if not found:
    return []
  flips = [estimates.sign_flip(x.differences) for x in found.values()]
  corrected = dict(zip(found, estimates.holm(flips)))
  name = metric.replace("_", " ")
  lines = [
    f"| method | n | training loss | {study.reference}, {name}{sign} | "
    f"{name}{sign} | difference{', points' if sign else ''} | p | p, Holm |",
    "|---" * 8 + "|",
  ]
  for (label, x), p in zip(found.items(), flips):
    gain = estimates.mean([factor * d for d in x.differences])
    assert gain is not None and p is not None
    half = "" if gain.half is None else f" ± {gain.half:.2f}"
    holm = corrected[label]
    lines.append(
      f"| {label} | {gain.seeds} | {x.level:.3f} | "
      f"{factor * x.reference:.2f} | {factor * x.score:.2f} | "
      f"{gain.mean:+.2f}{half} | {p:.3g} | {holm:.3g} |"
    )
  return lines


def note(study: Study) -> str:
  """Returns the sentences that explain the table's columns."""
  return (
    "Validation at equal training loss. Each pair of runs of one seed is "
    "compared at the higher one of the two training losses that they end at or "
    f"below: that of the method or of {study.reference}. A run's training loss "
    "at a validation is the mean of its batches since the validation before, "
    "as the method was given them; scores between two validations are "
    "interpolated. A run that passes that loss in the middle of its schedule "
    "has a higher learning rate there than a run that ends at it, so a "
    "difference may be due to the schedule: a control is the reference with "
    "fewer epochs. p: exact two-sided sign-flip test (Holm: over the methods "
    "of this table)."
  )


def figure(study: Study, results: Results) -> plots.Figure | None:
  """Returns a plot of the mean validation score against the training loss."""
  metric = tables.metric(results)
  factor, sign = tables.unit(metric)
  lines = {}
  for label, result in results.items():
    runs = [trajectory(row, metric) for row in result.finals.values()]
    known = [run for run in runs if run is not None]
    if known and len({len(run.loss) for run in known}) == 1:
      lines[label] = np.mean(np.asarray(known), 0)
  if not lines:
    return None
  colours = plots.colours_of(study, results)
  canvas = plots.blank(6.0, 3.6)
  axes = canvas.subplots()
  for label, (loss, score) in plots.last_coloured(lines, colours):
    colour = colours.get(label)
    axes.plot(
      loss,
      factor * score,
      marker="o",
      markersize=3,
      linewidth=1.4 if colour else 0.7,
      color=colour or plots.GREY,
    )
  # The loss falls in training, so training goes to the right.
  axes.invert_xaxis()
  axes.set(
    xlabel="training loss, nats (training goes to the right)",
    ylabel=f"validation {metric.replace('_', ' ')}{sign}",
  )
  plots.legend_below(canvas, colours, list(lines))
  return canvas
