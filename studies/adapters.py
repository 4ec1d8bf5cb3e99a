"""Does the dual idea carry over to other adapters than LoRA?

  python -m studies.adapters             runs what is not in runs.jsonl yet
  python -m studies.adapters --report    makes the report and the figure again

The protocol, written on 2026-11-28 before any run:

- MiniLM learns from 1,000 snippets, cut at 16 tokens, for two epochs in batches
  of 16. The labels are clean, or 40% of the training labels are wrong.
  Validation and test labels are always clean.
- Only the upper layer has adapters. The hidden states below it do not change,
  so they are computed once. This makes a run cheap enough for one CPU core: a
  study of two layers would take twice as long. A new head is trained whole.
- Each kind of adapter runs alone, and with an auxiliary of its own kind in a
  ball. LoRA also runs with an auxiliary of another kind, with an auxiliary that
  has a frozen orthonormal `a`, and with an auxiliary that shares the primary's
  `a`. The auxiliary has the primary's optimizer and is dropped before the test.
- The learning rate of a kind alone is the best of `RATES` on validation rows,
  by the mean of the two seeds of `TUNING`. With an auxiliary, the learning rate
  is that of the primary's kind alone, and rho is the best of `RHOS`.
- The seeds of `FINAL` are tested once. A seed draws the rows, their order, the
  head and the adapters, so two methods of one seed are a pair. The test is the
  exact sign-flip test, with Holm's correction over the auxiliaries of a regime.
- Runs are done in the order of `plan`: clean labels first, kind by kind. The
  report has what is finished, and says how many seeds there are.

Changed on the same day, after 27 tuning rows and before any test row: clean
labels come first. With wrong labels the validation accuracy of LoRA was 49 to
59%, so clean labels tell the methods apart sooner. No grid was changed.

The number of layers, tokens and epochs was set after trials of a run's time.
They had the seed 100, and one of them, with two layers, was tested on clean
labels. No learning rate or rho was chosen by them.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import datetime
import functools
import math
import pathlib
import time
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilora_jax
from bilora_jax import adapters, variants
from train import files, jsonl
from train.data import load as data_lib
from train.data import order
from train.data.options import DataOptions
from train.data.pipeline import Examples
from train.methods import optimizers
from train.methods.options import OptimisationOptions
from train.models import attention, load, pooling
from train.models.bert import model as bert
from train.study import estimates, forest, plots, record, tables

FOLDER = pathlib.Path(__file__).parent / "adapters"
REGIMES = {"clean labels": 0.0, "40% wrong labels": 0.4}
"""Names of the regimes, and the shares of wrong training labels."""
UPPER, LENGTH, EPOCHS, BATCH_SIZE = 1, 16, 2, 16
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 1000, 500, 1000
RHOS = (0.05, 0.5)
TUNING = (100, 101)
FINAL = tuple(range(5))
LORA, PROMPT, BOTTLENECK = "LoRA", "soft prompt", "bottleneck"
ORTHONORMAL, SHARED = "LoRA, orthonormal a", "LoRA, shared a"
SPEC = bilora_jax.LoraSpec(exclude="head", extra="head/.*")
PROMPT_LENGTH, BOTTLENECK_WIDTH = 4, 16
_FIGURE = "differences.svg"
KINDS = {
  "LoHa": adapters.loha(rank=4),
  "LoKr": adapters.lokr(rank=4, blocks=4),
  "VeRA": adapters.vera(rank=64),
  "(IA)^3": adapters.ia3(),
}
"""Kinds of adapters of kernels; LoRA is made by its spec."""
_LOW, _HIGH = (5e-4, 1.5e-3, 5e-3), (5e-3, 1.5e-2, 5e-2)
# Vectors and prompts take larger steps than matrices, as in their papers.
RATES = {
  LORA: _LOW,
  "LoHa": _LOW,
  "LoKr": _LOW,
  "VeRA": _HIGH,
  "(IA)^3": _HIGH,
  PROMPT: _HIGH,
  BOTTLENECK: _LOW,
}
"""Kinds of primaries, and the learning rates that are tried."""

Params = Any
Row = Mapping[str, Any]


class Arm(NamedTuple):
  """A primary, and an auxiliary; an empty string stands for no auxiliary."""

  primary: str
  auxiliary: str = ""

  @property
  def name(self) -> str:
    """The name in rows and tables."""
    return f"{self.primary} + {self.auxiliary or 'nothing'}"


ALONE = tuple(map(Arm, RATES))
DUAL = (
  *(Arm(kind, kind) for kind in RATES),
  *(Arm(LORA, x) for x in ("LoHa", "(IA)^3", ORTHONORMAL, SHARED)),
)


class Run(NamedTuple):
  """One run, of which a row is kept."""

  stage: str
  regime: str
  arm: Arm
  learning_rate: float
  rho: float
  seed: int

  @property
  def key(self) -> str:
    """Tells the run from all others."""
    point = f"{self.learning_rate:g}/{self.rho:g}"
    return f"{self.stage}/{self.regime}/{self.arm.name}/{point}/{self.seed}"


class Split(NamedTuple):
  """Rows with their hidden states below the adapted layers.

  Attributes:
    x: hidden states, float32 (rows, L, D).
    mask: True at a real token, (rows, L).
    labels: int32 (rows,).
  """

  x: jax.Array
  mask: jax.Array
  labels: jax.Array


def _rows(split: Split, places: Any) -> Split:
  return Split(*(x[places] for x in split))


class Upper(nn.Module):
  """The upper layers and the head of a `bert.BertClassifier`.

  Attributes:
    config: of the whole model.
    num_classes: outputs of the head.
    first: the number of the lowest layer.
    prompt: length of a soft prompt in front of the hidden states; 0: none.
    bottleneck: width of a bottleneck after each layer; 0: none.
  """

  config: Any
  num_classes: int
  first: int
  prompt: int = 0
  bottleneck: int = 0

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mask_BxL: jax.Array) -> jax.Array:
    """Logits, float32 (B, num_classes), of hidden states below `first`."""
    c, seen_BxL = self.config, mask_BxL
    if self.prompt:
      x_BxLxD = adapters.linen.SoftPrompt(self.prompt, name="prompt")(x_BxLxD)
      seen_BxL = jnp.pad(
        mask_BxL, ((0, 0), (self.prompt, 0)), constant_values=True
      )
    length = x_BxLxD.shape[1]
    kernel = attention.chosen("auto", jnp.float32, c.head_size, length)
    seen = attention.real(kernel, seen_BxL)
    x_NxD = x_BxLxD.reshape(-1, c.hidden_size)
    for i in range(self.first, c.num_layers):
      x_NxD = bert.Layer(c, length, None, name=f"layer_{i}")(x_NxD, seen)
      if self.bottleneck:
        bottleneck = adapters.linen.Bottleneck(
          self.bottleneck, name=f"after_{i}"
        )
        x_NxD = bottleneck(x_NxD)
    # The head is given the real tokens, which have seen the prompt.
    x_BxLxD = x_NxD.reshape(x_BxLxD.shape)[:, self.prompt :]
    pooled_BxD = pooling.pooled(x_BxLxD, mask_BxL, c.pooling)
    return nn.Dense(self.num_classes, name="head")(pooled_BxD)


def lower(config: Any, variables: Any, tokens: Any, mask: Any) -> jax.Array:
  """Hidden states below the upper layers, float32 (B, L, D).

  Args:
    config: of the whole model, with the lower layers alone as `num_layers`.
    variables: of the whole model.
    tokens: int (B, L).
    mask: True at a real token, (B, L).
  """
  params = {"params": variables["params"]["encoder"]}
  found: Any = bert.Bert(config).apply(params, tokens, mask)
  return found


def upper_variables(variables: Any, first: int) -> dict[str, Any]:
  """The variables of `Upper`, of those of the whole model."""
  params = variables["params"]
  layers = {
    name: x
    for name, x in params["encoder"].items()
    if name.startswith("layer_") and int(name.removeprefix("layer_")) >= first
  }
  return {"params": {**layers, "head": params["head"]}}


class Method(NamedTuple):
  """How an arm is trained.

  Attributes:
    init: `(key, variables)` to what is trained.
    logits: `(variables, params, x, mask)` to the logits.
    transformation: `(learning_rate, rho, steps)` to the update.
    nodes: from what is trained to the auxiliary's adapters.
    cosine: `(variables, params, batch)` to the cosine between the auxiliary's
      change of the weights and the batch's gradient at the primary alone.
  """

  init: Callable[..., Params]
  logits: Callable[..., Any]
  transformation: Callable[..., optax.GradientTransformation]
  nodes: Callable[[Params], Any]
  cosine: Callable[..., jax.Array]


def method(arm: Arm, model: Upper) -> Method:
  """The method of an arm.

  Args:
    arm: the primary and the auxiliary.
    model: without a prompt and bottlenecks.
  """
  inside = arm.primary in (PROMPT, BOTTLENECK)
  init, logits, cosine = (_of_module if inside else _of_kernels)(arm, model)

  def transformation(learning_rate, rho, steps):
    optimizer = optimizers.adamw(
      OptimisationOptions(learning_rate=learning_rate), steps
    )
    if not arm.auxiliary:
      return adapters.without_held(optimizer)
    kind = variants.shared_a if arm.auxiliary == SHARED else bilora_jax.bilora
    # A schedule may be traced, so that one program has every rho.
    return kind(optimizer, lambda count: rho)

  def nodes(params):
    if arm.auxiliary == SHARED:
      params = variants.with_shared_a(params)
    return params["auxiliary"]

  return Method(init, logits, transformation, nodes, cosine)


def loss(logits: Any, labels: jax.Array) -> jax.Array:
  """The mean cross-entropy, in nats."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.mean(losses)


def _of_kernels(arm: Arm, model: Upper):
  """`init`, `logits` and `cosine` of adapters of kernels."""
  shapes = (
    jax.ShapeDtypeStruct((1, 2, model.config.hidden_size), jnp.float32),
    jax.ShapeDtypeStruct((1, 2), jnp.bool),
  )
  adapted = bilora_jax.adapt(model, SPEC, *shapes)

  def new(key, variables, kind):
    if kind not in KINDS:
      return adapted.init(key, variables)
    return adapters.init(key, adapted, variables, KINDS[kind])

  def init(key, variables):
    params = new(key, variables, arm.primary)
    if not arm.auxiliary:
      return bilora_jax.without_auxiliary(params)
    params["auxiliary"] = new(key, variables, arm.auxiliary)["auxiliary"]
    if arm.auxiliary == ORTHONORMAL:
      return variants.orthonormal_a(key, params)
    return variants.share_a(params) if arm.auxiliary == SHARED else params

  def whole(params):
    """With pairs in the auxiliary."""
    is_shared = arm.auxiliary == SHARED and "auxiliary" in params
    return variants.with_shared_a(params) if is_shared else params

  def logits(variables, params, x, mask):
    return adapted.apply(variables, whole(params), x, mask)

  def cosine(variables, params, batch):
    params = whole(params)
    merged = adapted.merge(variables, params)

    def loss_fn(variables):
      return loss(model.apply(variables, batch.x, batch.mask), batch.labels)

    # Gains of two (IA)^3 add up, and are not multiplied by each other.
    base = variables if arm.primary == "(IA)^3" else merged
    other = {"primary": params["auxiliary"], "extra": params["extra"]}
    change = jax.tree.map(jnp.subtract, adapted.merge(base, other), base)
    return _cosine(
      *(
        [traverse_util.flatten_dict(x["params"], sep="/")[p] for p in targets]
        for x in (change, jax.grad(loss_fn)(merged))
      )
    )

  targets = tuple(adapted.targets)
  return init, logits, cosine


def _of_module(arm: Arm, model: Upper):
  """`init`, `logits` and `cosine` of prompts or bottlenecks, and their sums."""
  sizes: dict[str, Any] = {"bottleneck": BOTTLENECK_WIDTH}
  if arm.primary == PROMPT:
    sizes = {"prompt": PROMPT_LENGTH}
  model = model.clone(**sizes)

  def init(key, variables):
    x = jnp.zeros((1, 2, model.config.hidden_size))
    primary = model.init(key, x, jnp.ones((1, 2), bool))["adapters"]
    params = {
      "primary": primary,
      "extra": {"head": variables["params"]["head"]},
    }
    if arm.auxiliary:
      params["auxiliary"] = optax.tree.zeros_like(primary)
    return params

  def logits(variables, params, x, mask):
    nodes = params["primary"]
    if "auxiliary" in params:
      nodes = optax.tree.add(nodes, params["auxiliary"])
    own = {**variables["params"], **params["extra"]}
    return model.apply({"params": own, "adapters": nodes}, x, mask)

  def cosine(variables, params, batch):
    def loss_fn(primary):
      own = {"primary": primary, "extra": params["extra"]}
      return loss(logits(variables, own, batch.x, batch.mask), batch.labels)

    gradient = jax.grad(loss_fn)(params["primary"])
    return _cosine(params["auxiliary"], gradient)

  return init, logits, cosine


def _cosine(left: Any, right: Any) -> jax.Array:
  norms = optax.tree.norm(left) * optax.tree.norm(right)
  return jnp.asarray(optax.tree.vdot(left, right)) / jnp.where(
    norms > 0, norms, 1.0
  )


class Programs(NamedTuple):
  """An arm's compiled programs, for every seed, learning rate and rho.

  Attributes:
    method: of the arm.
    epoch: `(params, state, variables, rows, batches, learning_rate, rho)` to
      the next parameters and state, and the mean loss of the steps.
    right: `(variables, params, split)` to how many rows are right.
    norm: from what is trained to the norm of the auxiliary.
    cosine: that of the method.
  """

  method: Method
  epoch: Callable[..., tuple[Params, Any, jax.Array]]
  right: Callable[..., jax.Array]
  norm: Callable[[Params], jax.Array]
  cosine: Callable[..., jax.Array]


def programs(arm: Arm, model: Upper, steps: int) -> Programs:
  """The programs of an arm.

  Args:
    arm: the primary and the auxiliary.
    model: without a prompt and bottlenecks.
    steps: of a whole run.
  """
  own = method(arm, model)

  def epoch(params, state, variables, rows, batches, learning_rate, rho):
    tx = own.transformation(learning_rate, rho, steps)

    def step(carry, places):
      params, state = carry
      batch = _rows(rows, places)

      def loss_fn(params):
        logits = own.logits(variables, params, batch.x, batch.mask)
        return loss(logits, batch.labels)

      value, gradient = jax.value_and_grad(loss_fn)(params)
      updates, state = tx.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), value

    (params, state), values = jax.lax.scan(step, (params, state), batches)
    return params, state, jnp.mean(values)

  def right(variables, params, split):
    logits = own.logits(variables, params, split.x, split.mask)
    return jnp.sum(jnp.argmax(logits, -1) == split.labels)

  def norm(params):
    nodes = jax.tree.leaves(
      own.nodes(params), is_leaf=lambda x: hasattr(x, "squared_norm")
    )
    return jnp.sqrt(sum(jnp.square(adapters.norm(node)) for node in nodes))

  return Programs(
    own,
    jax.jit(epoch),
    jax.jit(right),
    jax.jit(norm),
    jax.jit(own.cosine),
  )


class Measured(NamedTuple):
  """What is kept of a run.

  Attributes:
    accuracy: on the held-out rows, without the auxiliary.
    loss: mean training loss of the last epoch, as the steps met it, in nats.
    norm_over_rho: norm of the auxiliary at the end, over rho.
    cosine: mean of `Method.cosine`, on the batch to come, at the end of each
      epoch but the last.
  """

  accuracy: float
  loss: float
  norm_over_rho: float | None
  cosine: float | None


def train(
  own: Programs,
  alone: Programs,
  variables: Any,
  rows: Split,
  held_out: Split,
  batches: np.ndarray,
  run: Run,
) -> Measured:
  """Trains an arm and tests it.

  Args:
    own: of the arm.
    alone: of the arm's primary alone, which test it.
    variables: of `Upper`.
    rows: to train on.
    held_out: to test on.
    batches: the rows of each step, (epochs, steps of an epoch, batch size).
    run: the learning rate, rho and the seed.
  """
  params = own.method.init(jax.random.key(run.seed), variables)
  steps = batches[..., 0].size
  state = own.method.transformation(0.0, 0.0, steps).init(params)
  cosines, value = [], jnp.nan
  for number, places in enumerate(batches):
    if run.arm.auxiliary and number:
      batch = _rows(rows, places[0])
      cosines.append(float(own.cosine(variables, params, batch)))
    params, state, value = own.epoch(
      params, state, variables, rows, places, run.learning_rate, run.rho
    )
  kept = bilora_jax.without_auxiliary(params)
  size = min(250, len(held_out.labels))
  right = sum(
    int(alone.right(variables, kept, _rows(held_out, slice(i, i + size))))
    for i in range(0, len(held_out.labels), size)
  )
  return Measured(
    right / len(held_out.labels),
    float(value),
    float(own.norm(params)) / run.rho if run.arm.auxiliary else None,
    float(np.mean(cosines)) if cosines else None,
  )


def padded(examples: Examples, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens, padded with 0 to a length, int (rows, L), and their mask."""
  mask = np.arange(length) < examples.lengths[:, None]
  tokens = np.zeros(mask.shape, np.int32)
  tokens[mask] = examples.tokens
  return tokens, mask


class Lab:
  """The model, its data and its programs, each made when it is first needed."""

  def __init__(self):
    self.pretrained = load.open_pretrained("minilm")
    self.config = self.pretrained.config
    self.first = self.config.num_layers - UPPER
    self.steps = EPOCHS * (TRAIN_ROWS // BATCH_SIZE)
    classifier = self.pretrained.classifier(2)
    self.whole = functools.lru_cache(2)(
      lambda seed: self.pretrained.variables(classifier, seed)
    )
    below = self.config.__class__(
      **{**vars(self.config), "num_layers": self.first}
    )
    self._lower = jax.jit(functools.partial(lower, below))
    model = Upper(self.config, 2, self.first)
    self.programs = functools.cache(
      lambda arm: programs(arm, model, self.steps)
    )
    self.labelled = functools.cache(self._labelled)
    self.states = functools.cache(self._states)

  def _labelled(self, regime: str, seed: int) -> Any:
    options = DataOptions(
      train_rows=TRAIN_ROWS,
      eval_rows=TEST_ROWS,
      label_noise=REGIMES[regime],
      max_length=LENGTH,
    )
    return data_lib.load(
      options,
      self.pretrained,
      batch_size=BATCH_SIZE,
      epochs=EPOCHS,
      seed=seed,
    )

  def _states(self, seed: int, name: str, rows: int) -> tuple[Any, Any]:
    """The states of a split's first rows; the regimes share their texts."""
    examples = self.labelled(next(iter(REGIMES)), seed).examples[name]
    tokens, mask = (x[:rows] for x in padded(examples, LENGTH))
    size = min(250, rows)
    states = [
      self._lower(self.whole(0), tokens[i : i + size], mask[i : i + size])
      for i in range(0, rows, size)
    ]
    return jnp.concatenate(states), jnp.asarray(mask)

  def split(self, regime: str, seed: int, name: str, rows: int) -> Split:
    """The first rows of a split, as the regime labels them."""
    labels = self.labelled(regime, seed).examples[name].labels[:rows]
    return Split(*self.states(seed, name, rows), jnp.asarray(labels))

  def measure(self, run: Run) -> Measured:
    """Does a run."""
    rows = self.split(run.regime, run.seed, "train", TRAIN_ROWS)
    held_out = (
      self.split(run.regime, run.seed, "validation", VALIDATION_ROWS)
      if run.stage == "tuning"
      else self.split(run.regime, run.seed, "test", TEST_ROWS)
    )
    lengths = self.labelled(run.regime, run.seed).examples["train"].lengths
    batches = np.stack(
      [
        order.batches(lengths, BATCH_SIZE, 0, run.seed, epoch)
        for epoch in range(EPOCHS)
      ]
    )
    return train(
      self.programs(run.arm),
      self.programs(Arm(run.arm.primary)),
      upper_variables(self.whole(run.seed), self.first),
      rows,
      held_out,
      batches,
      run,
    )


def trials(regime: str, arm: Arm, rate: float | None) -> list[list[Run]]:
  """The tuning runs of an arm: for each point of its grid, one for each seed.

  Args:
    regime: of the labels.
    arm: the primary and the auxiliary.
    rate: the learning rate of the primary alone, if there is an auxiliary.
  """
  if arm.auxiliary:
    assert rate is not None
    points = [(rate, rho) for rho in RHOS]
  else:
    points = [(x, 0.0) for x in RATES[arm.primary]]
  return [
    [Run("tuning", regime, arm, *point, seed) for seed in TUNING]
    for point in points
  ]


def winner(
  runs: Sequence[Sequence[Run]], rows: Mapping[str, Row]
) -> Run | None:
  """A run of the best point; of equal points, of the first; None if not known.

  Args:
    runs: as `trials` gives them.
    rows: finished runs by their keys.
  """
  if not all(run.key in rows for point in runs for run in point):
    return None
  scores = [
    np.mean([rows[run.key]["accuracy"] for run in point]) for point in runs
  ]
  return runs[int(np.argmax(scores))][0]


def plan(rows: Mapping[str, Row]) -> list[Run]:
  """The runs that can start now, in order; others wait for a point to win.

  Args:
    rows: finished runs by their keys.
  """
  found: list[Run] = []
  for regime in REGIMES:
    for primary in RATES:
      rate, points = None, []
      for arm in (x for x in ALONE + DUAL if x.primary == primary):
        if arm.auxiliary and rate is None:
          break
        tried = trials(regime, arm, rate)
        found += [run for point in tried for run in point]
        best = winner(tried, rows)
        points.append(best)
        if best and not arm.auxiliary:
          rate = best.learning_rate
      found += [
        best._replace(stage="final", seed=seed)
        for seed in FINAL
        for best in points
        if best
      ]
  return found


def finished(path: pathlib.Path) -> dict[str, Row]:
  """The rows by their keys."""
  return {row["key"]: row for row in jsonl.read_log(path)}


def run_all(
  path: pathlib.Path, measure: Callable[[Run], Measured], seconds: float
) -> None:
  """Does the runs that have no row yet, and appends a row for each.

  Args:
    path: of the rows.
    measure: does a run.
    seconds: no run starts after them.
  """
  start = time.monotonic()
  while time.monotonic() - start < seconds:
    rows = finished(path)
    run = next((run for run in plan(rows) if run.key not in rows), None)
    if run is None:
      return
    began = time.monotonic()
    measured = measure(run)
    if not all(math.isfinite(x) for x in measured if x is not None):
      raise FloatingPointError(f"{run.key} is not finite: {measured}.")
    row = {
      "key": run.key,
      **run._asdict(),
      "arm": run.arm.name,
      **measured._asdict(),
      "seconds": round(time.monotonic() - began, 2),
      "jax": jax.__version__,
      "date": datetime.date.today().isoformat(),
    }
    record.append(path, row)
    print(f"{run.key}: {measured.accuracy:.3f} {row['seconds']}", flush=True)


Finals = dict[tuple[str, Arm], dict[int, Row]]
"""Test rows by the regime and the arm, then by the seed."""


def finals(rows: Mapping[str, Row]) -> Finals:
  """The test rows of the points that won; rows of other points do not count."""
  found: Finals = {}
  for run in plan(rows):
    if run.stage == "final" and run.key in rows:
      found.setdefault((run.regime, run.arm), {})[run.seed] = rows[run.key]
  return found


def gains(tested: Finals, regime: str) -> dict[Arm, list[float]]:
  """Test accuracy minus that of the primary alone, in points, by the seed."""
  return {
    arm: [
      100 * x
      for x in estimates.differences(
        _numbers(tested, regime, arm, "accuracy"),
        _numbers(tested, regime, Arm(arm.primary), "accuracy"),
      )
    ]
    for arm in DUAL
  }


def _numbers(
  tested: Finals, regime: str, arm: Arm, name: str
) -> dict[int, float]:
  found = tested.get((regime, arm), {})
  return {seed: row[name] for seed, row in found.items()}


def report(rows: Mapping[str, Row]) -> str:
  """The report, in Markdown.

  Args:
    rows: finished runs by their keys.
  """
  tested = finals(rows)
  pairs = [len(x) for regime in REGIMES for x in gains(tested, regime).values()]
  lines = [
    "# Other adapters in the ball",
    "",
    "Made from `runs.jsonl` by `python -m studies.adapters --report`. The "
    "docstring of [`studies/adapters.py`](../adapters.py) is the protocol.",
    "",
    f"There are {len(rows)} finished runs, tuning included. Of "
    f"{len(pairs)} comparisons, {sum(x >= len(FINAL) for x in pairs)} have all "
    f"{len(FINAL)} seeds. The smallest p that {len(FINAL)} pairs can give is "
    f"{estimates.smallest(len(FINAL)):.4g}.",
    "",
    f"![test accuracy minus that of the primary alone]({_FIGURE})",
  ]
  for regime in REGIMES:
    lines += ["", f"## {regime.capitalize()}", "", *table(tested, regime)]
  lines += [
    "",
    "± is the 95% t-interval over seeds. The difference is the test accuracy "
    "with the auxiliary minus that of the same primary alone, paired by the "
    "seed. p is that of the exact two-sided sign-flip test. Holm's correction "
    "is over the auxiliaries of a table.",
    "",
    "The training loss is the mean of the last epoch, as the steps met it, so "
    "with the auxiliary in place. The norm is that of the auxiliary after the "
    "last step, over rho. The cosine is between the auxiliary's change of the "
    "weights and the gradient of the batch to come, at the primary alone, "
    "after the first epoch. For prompts and bottlenecks, both are taken in the "
    "parameters of the adapter, and so is the norm.",
    "",
    "## Tuning",
    "",
    f"Mean accuracy of {VALIDATION_ROWS} validation rows and of the seeds "
    f"{', '.join(map(str, TUNING))}.",
    "",
    *_tuning(rows),
  ]
  return "\n".join(lines) + "\n"


def table(tested: Finals, regime: str) -> list[str]:
  """The table of a regime: a row for each arm that has been tested."""
  paired = gains(tested, regime)
  raw = {arm: estimates.sign_flip(paired[arm]) for arm in DUAL}
  corrected = dict(zip(DUAL, estimates.holm(list(raw.values()))))
  cells = []
  for arm in (x for kind in RATES for x in ALONE + DUAL if x.primary == kind):
    if not (found := tested.get((regime, arm))):
      continue
    row = next(iter(found.values()))

    def mean(name, factor, digits, arm=arm):
      numbers = _numbers(tested, regime, arm, name).values()
      known = [x for x in numbers if x is not None]
      return tables.estimate(estimates.mean(known), factor, digits)

    gain = estimates.mean(paired.get(arm, []))
    cells.append(
      [
        arm.name,
        f"{row['learning_rate']:g}",
        f"{row['rho']:g}" if arm.auxiliary else "",
        str(len(found)),
        mean("accuracy", 100.0, 2),
        tables.estimate(gain, 1.0, 2, signed=True),
        tables.p_value(raw.get(arm)),
        tables.p_value(corrected.get(arm)),
        mean("loss", 1.0, 3),
        mean("norm_over_rho", 1.0, 2),
        mean("cosine", 1.0, 2),
      ]
    )
  heads = [
    "primary + auxiliary",
    "learning rate",
    "rho",
    "n",
    "test accuracy, %",
    "difference, points",
    "p",
    "p, Holm",
    "training loss, nats",
    "norm / rho",
    "cosine",
  ]
  return tables.lines(heads, cells)


def _tuning(rows: Mapping[str, Row]) -> list[str]:
  points: dict[tuple[str, ...], list[float]] = {}
  for run in plan(rows):
    if run.stage == "tuning" and run.key in rows:
      rho = f"{run.rho:g}" if run.arm.auxiliary else ""
      point = run.regime, run.arm.name, f"{run.learning_rate:g}", rho
      points.setdefault(point, []).append(rows[run.key]["accuracy"])
  heads = ["regime", "method", "learning rate", "rho", "n", "accuracy, %"]
  return tables.lines(
    heads,
    [
      [*point, str(len(x)), f"{100 * np.mean(x):.2f}"]
      for point, x in points.items()
    ],
  )


def figure(rows: Mapping[str, Row]) -> plots.Figure:
  """A panel for each regime, with a row for each auxiliary."""
  tested = finals(rows)
  labels = [arm.name for arm in reversed(DUAL)]
  with plots.styled():
    canvas = plots.blank(7.4, 1.1 + 0.24 * len(labels))
    grid = canvas.subplots(1, len(REGIMES), sharey=True)
    for axes, regime in zip(grid, REGIMES):
      means = {
        arm.name: gain
        for arm, values in gains(tested, regime).items()
        if (gain := estimates.mean(values))
      }
      colours = dict.fromkeys(means, forest.ONE)
      seeds = forest.panel(axes, labels, means, colours)
      axes.set(title=regime, xlabel=f"accuracy, points{seeds}")
    grid[0].set_yticks(range(len(labels)), labels)
    canvas.suptitle(
      "Test accuracy minus that of the primary alone, paired by seed, 95% "
      "intervals",
      fontsize=9,
    )
  return canvas


def main(argv: Sequence[str] | None = None) -> None:
  """Runs what is left, and writes the report."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--report", action="store_true", help="run nothing")
  parser.add_argument(
    "--minutes", type=float, default=math.inf, help="start no run after them"
  )
  options = parser.parse_args(argv)
  FOLDER.mkdir(exist_ok=True)
  path = FOLDER / record.RUNS
  if not options.report:
    run_all(path, Lab().measure, 60 * options.minutes)
  rows = finished(path)
  files.write_atomically(FOLDER / "report.md", report(rows))
  plots.save(figure(rows), FOLDER / _FIGURE)


if __name__ == "__main__":
  main()
