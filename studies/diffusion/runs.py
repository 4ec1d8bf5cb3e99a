"""The runs of the study, and the rows that they leave."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from sklearn import datasets, neighbors

from bilora_jax import (
  LoraSpec,
  adapt,
  baselines,
  bilora,
  variants,
  without_auxiliary,
)
from studies.diffusion.denoising import (
  NEW,
  SIDE,
  Predict,
  denoising_loss,
  digits,
  draw,
  fixed,
  sampled,
)
from studies.diffusion.dit import DiT
from train import files, jsonl
from train.study import record

REFERENCE = "LoRA r=4"
_CACHE = pathlib.Path(__file__).parents[2] / ".cache"

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes of the study.

  Attributes:
    width, depth, heads: of the transformer.
    base_steps, base_batch, base_learning_rate: of the training of the base.
    images: of the 9, to adapt to.
    batch: images in a step of an adaptation.
    steps: of an adaptation.
    every: steps between two measurements.
    draws: times and noises for each measured image.
    samples: images that a final run samples.
    sampling_steps: of DDIM.
    learning_rates: of the methods without a rho.
    rhos: of the others.
    tuning_seeds, seeds: of the two stages.
  """

  width: int = 64
  depth: int = 3
  heads: int = 4
  base_steps: int = 4000
  base_batch: int = 128
  base_learning_rate: float = 2e-3
  images: int = 16
  batch: int = 4
  steps: int = 1000
  every: int = 100
  draws: int = 8
  samples: int = 64
  sampling_steps: int = 50
  learning_rates: tuple[float, ...] = tuple(1e-4 * 2**k for k in range(10))
  rhos: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
  tuning_seeds: tuple[int, ...] = (100, 101)
  seeds: tuple[int, ...] = tuple(range(10))

  @property
  def digest(self) -> str:
    """A short name of these settings, which rows carry."""
    told = json.dumps(dataclasses.asdict(self), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:8]


class Method(NamedTuple):
  """How adapters are trained; all but LoRA have a rho.

  Attributes:
    rank, auxiliary_rank: of the two adapters.
    power: whether the auxiliary climbs by power ascent.
    sam: whether the gradient is LoRA-SAM's.
    longer: how many times the steps of the settings a run has; a control if
      above 1.
  """

  rank: int = 4
  auxiliary_rank: int = 0
  power: bool = False
  sam: bool = False
  longer: int = 1

  @property
  def has_rho(self) -> bool:
    return self.sam or self.auxiliary_rank > 0

  @property
  def gradients(self) -> int:
    """Gradients in a step."""
    return 2 if self.sam else 1


METHODS = {
  REFERENCE: Method(),
  "LoRA r=8": Method(rank=8),
  "LoRA-SAM": Method(sam=True),
  "Bi-LoRA": Method(auxiliary_rank=4),
  "Bi-LoRA, power ascent": Method(auxiliary_rank=4, power=True),
  "LoRA r=4, twice the steps": Method(longer=2),
}


def make_model(settings: Settings) -> DiT:
  return DiT(settings.width, settings.depth, settings.heads)


def make_base(model: DiT, settings: Settings) -> Any:
  """Trains the model on the old classes; returns its variables."""
  data = digits()
  start_key, key = jax.random.split(jax.random.key(0))
  tx = optax.adam(
    optax.cosine_decay_schedule(
      settings.base_learning_rate, settings.base_steps
    )
  )
  draw_old = functools.partial(
    draw,
    images=data.old,
    labels=data.old_labels,
    count=settings.base_batch,
  )

  @jax.jit
  def trained(variables):
    def step(carry, step_key):
      variables, opt_state = carry
      grads = jax.grad(
        lambda x: denoising_loss(
          functools.partial(model.apply, x), draw_old(step_key)
        )
      )(variables)
      updates, opt_state = tx.update(grads, opt_state)
      return (optax.apply_updates(variables, updates), opt_state), None

    carry = variables, tx.init(variables)
    keys = jax.random.split(key, settings.base_steps)
    return jax.lax.scan(step, carry, keys)[0][0]

  first = draw_old(start_key)
  return trained(model.init(start_key, first.images, first.times, first.labels))


def cached_base(model: DiT, settings: Settings) -> Any:
  """The base, trained once; git ignores the file that keeps it."""
  path = _CACHE / f"diffusion-{settings.digest}.safetensors"
  if not path.exists():
    path.parent.mkdir(exist_ok=True)
    flat = traverse_util.flatten_dict(make_base(model, settings), sep="/")
    files.save_tensors(path, {k: np.asarray(x) for k, x in flat.items()})
  return traverse_util.unflatten_dict(
    safetensors.numpy.load_file(path), sep="/"
  )


class Measured(NamedTuple):
  """The batches that are measured, or the losses on them."""

  training: Any
  new: Any
  old: Any


class Adaptation(NamedTuple):
  """What a method's adaptation is made of, compiled once.

  Attributes:
    train: `(variables, key, images, learning_rate, rho, measured) ->
      (history, losses)`: the primary after each measurement, and its losses.
    sample: `(variables, primary, key) -> images` of the 9.
  """

  train: Callable[..., Any]
  sample: Callable[..., Any]


@functools.cache
def make_adaptation(method: Method, settings: Settings) -> Adaptation:
  """The training and the sampling of a method."""
  spec = LoraSpec(
    rank=method.rank,
    alpha=2.0 * method.rank,
    auxiliary_rank=method.auxiliary_rank,
  )
  inputs = jnp.zeros((1, SIDE, SIDE)), jnp.zeros(1, int), jnp.zeros(1, int)
  adapted = adapt(make_model(settings), spec, *inputs)
  labels = jnp.full(settings.images, NEW)
  shape = method.longer * settings.steps // settings.every, settings.every

  def predicting(variables, adapters) -> Predict:
    return functools.partial(adapted.apply, variables, adapters)

  @jax.jit
  def train(variables, key, images, learning_rate, rho, measured):
    def loss_fn(adapters, batch):
      return denoising_loss(predicting(variables, adapters), batch)

    estimator = baselines.sam(rho) if method.sam else baselines.gradient()
    tx = optax.adam(learning_rate)
    if method.auxiliary_rank:
      ascent = variants.power_ascent() if method.power else None
      tx = bilora(tx, rho, ascent)

    def step(carry, step_key):
      adapters, opt_state = carry
      (_, grads), _ = estimator.estimate(
        jax.value_and_grad(loss_fn),
        (),
        step_key,
        adapters,
        draw(step_key, images, labels, settings.batch),
      )
      updates, opt_state = tx.update(grads, opt_state, adapters)
      return (optax.apply_updates(adapters, updates), opt_state), None

    def stretch(carry, keys):
      carry, _ = jax.lax.scan(step, carry, keys)
      return carry, without_auxiliary(carry[0])

    start_key, key = jax.random.split(key)
    start = adapted.init(start_key, variables)
    _, later = jax.lax.scan(
      stretch, (start, tx.init(start)), jax.random.split(key, shape)
    )
    history = jax.tree.map(
      lambda x, y: jnp.concatenate([x[None], y]),
      without_auxiliary(start),
      later,
    )
    return history, jax.lax.map(
      lambda x: Measured(*(loss_fn(x, batch) for batch in measured)), history
    )

  @jax.jit
  def sample(variables, primary, key):
    return sampled(
      predicting(variables, primary),
      jax.random.normal(key, (settings.samples, SIDE, SIDE)),
      jnp.full(settings.samples, NEW),
      settings.sampling_steps,
    )

  return Adaptation(train, sample)


def share_of_nines(images: np.ndarray) -> float:
  """The share of images that their nearest digits say are a 9."""
  found: Any = datasets.load_digits()
  judge = neighbors.KNeighborsClassifier(3)
  judge.fit(found.images.reshape(-1, SIDE**2) / 8 - 1, found.target)
  told = judge.predict(np.asarray(images).reshape(-1, SIDE**2))
  return float(np.mean(told == NEW))


class Study:
  """The rows of a folder, and the runs that add to them.

  Attributes:
    folder: of the rows and the report.
    settings: of all runs.
    rows: finished runs of these settings by their keys.
  """

  def __init__(self, folder: pathlib.Path, settings: Settings):
    self.folder, self.settings = folder, settings
    self._path = folder / record.RUNS
    self.rows: dict[str, Row] = {
      row["key"]: row
      for row in jsonl.read_log(self._path)
      if row["settings"] == settings.digest
    }

  def run(self) -> None:
    """Runs what is unfinished, in the order of the protocol."""
    self._once("base", self._base)
    for name in METHODS:
      for point in self.points(name):
        for seed in self.settings.tuning_seeds:
          self._adapted("tuning", name, point, seed)
    for name in METHODS:
      for seed in self.settings.seeds:
        self._adapted("final", name, self.winner(name), seed)

  def points(self, name: str) -> list[dict[str, float]]:
    """The points of a method's grid; most depend on what won for LoRA r=4."""
    rates = self.settings.learning_rates
    if METHODS[name].longer > 1:
      rate = self.winner(REFERENCE)["learning_rate"]
      rates = rate, rate / 2, rate / 4
    if not METHODS[name].has_rho:
      return [{"learning_rate": rate, "rho": 0.0} for rate in rates]
    rate = self.winner(REFERENCE)["learning_rate"]
    return [
      {"learning_rate": found, "rho": rho}
      for found, rho in itertools.product((rate, rate / 2), self.settings.rhos)
    ]

  def validation(self, name: str, point: Row) -> np.ndarray:
    """The mean validation loss by the measurement; infinite where one broke."""
    curves = [
      self.rows[key_of("tuning", name, point, seed)]["curves"]["new"]
      for seed in self.settings.tuning_seeds
    ]
    losses = [[math.inf if x is None else x for x in curve] for curve in curves]
    return np.mean(losses, axis=0)

  def winner(self, name: str) -> dict[str, float]:
    """The point and the number of steps with the lowest validation loss."""
    points = self.points(name)
    # Measurement 0 is the base, which is no adaptation.
    losses = np.array([self.validation(name, x)[1:] for x in points])
    best, place = np.unravel_index(np.argmin(losses), losses.shape)
    return points[best] | {"steps": int(place + 1) * self.settings.every}

  def _adapted(self, stage: str, name: str, point: Any, seed: int) -> None:
    key = key_of(stage, name, point, seed)
    self._once(key, lambda: self._adaptation(stage, name, point, seed))

  def _once(self, key: str, run: Callable[[], dict[str, Any]]) -> None:
    if key in self.rows:
      return
    began = time.monotonic()
    row = {"key": key, "settings": self.settings.digest} | run()
    row["seconds"] = round(time.monotonic() - began, 1)
    row |= {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    self.folder.mkdir(parents=True, exist_ok=True)
    row = files.finite(row)
    record.append(self._path, row)
    self.rows[key] = row
    print(key, f"{row['seconds']} s", flush=True)

  @functools.cached_property
  def _model(self) -> tuple[DiT, Any]:
    model = make_model(self.settings)
    return model, cached_base(model, self.settings)

  def _measured(self, stage: str, images: np.ndarray) -> Measured:
    data, draws = digits(), self.settings.draws
    new = data.test if stage == "final" else data.validation
    return Measured(
      fixed(images, np.full(len(images), NEW), draws),
      fixed(new, np.full(len(new), NEW), draws),
      fixed(data.held_out, data.held_out_labels, 2),
    )

  def _base(self) -> dict[str, Any]:
    """What the base does before any adaptation."""
    model, variables = self._model
    predict = jax.jit(functools.partial(model.apply, variables))
    noise = jax.random.normal(jax.random.key(0), (NEW + 1, SIDE, SIDE))
    images = sampled(
      predict, noise, jnp.arange(NEW + 1), self.settings.sampling_steps
    )
    return {
      "parameters": sum(x.size for x in jax.tree.leaves(variables)),
      "samples": ink(images),
      "old": float(
        denoising_loss(predict, self._measured("", digits().pool).old)
      ),
    }

  def _adaptation(
    self, stage: str, name: str, point: Row, seed: int
  ) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    images = rng.permutation(digits().pool)[: self.settings.images]
    _, variables = self._model
    made = make_adaptation(METHODS[name], self.settings)
    train_key, sample_key = jax.random.split(jax.random.key(seed))
    history, losses = made.train(
      variables,
      train_key,
      images,
      point["learning_rate"],
      point["rho"],
      self._measured(stage, images),
    )
    row = {
      "stage": stage,
      "method": name,
      "point": point,
      "seed": seed,
      "gradients_per_step": METHODS[name].gradients,
      "curves": {
        part: np.asarray(curve, float).round(7).tolist()
        for part, curve in losses._asdict().items()
      },
    }
    if stage == "final":
      place = int(point["steps"]) // self.settings.every
      primary = jax.tree.map(lambda x: x[place], history)
      samples = np.asarray(made.sample(variables, primary, sample_key))
      row["share_of_nines"] = share_of_nines(samples)
      if seed == self.settings.seeds[0]:
        row["samples"] = ink(samples[: NEW + 1])
    return row


def key_of(stage: str, name: str, point: Row, seed: int) -> str:
  values = f"{point['learning_rate']:g}/{point['rho']:g}"
  return f"{stage}/{name}/{values}/{seed}"


def ink(images: Any) -> list[list[int]]:
  """Images as ink from 0 to 16, as the digits come."""
  flat = np.asarray(images).reshape(len(images), -1)
  return np.clip((flat + 1) * 8, 0, 16).round().astype(int).tolist()
