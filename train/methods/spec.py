"""`MethodSpec`: what a method of `--method` is, and the methods by name."""

from collections.abc import Callable
import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .. import options as options_lib
from ..errors import UsageError
from .options import AdapterOptions, OptimisationOptions

# The command line needs the names and the options of all methods, and answers
# in half a second without JAX: a method imports it when it is built.
if TYPE_CHECKING:
  import optax

  import bilora_jax

  from ..data.objectives import Objective

Apply = Callable[..., Any]
"""`(variables, trained, *inputs, rngs=None)` to the logits."""
Init = Callable[[Any, Any], Any]
"""`(key, variables)` to what is trained."""

# The files whose `SPECS` are the program's own methods, the default's first.
_FILES = ("bilora", "lora", "sam", "nystroem", "noise", "parameters")


class Setting(NamedTuple):
  """What a method is built for.

  Attributes:
    options: the method's own.
    adapter: ranks, targets and so on.
    optimisation: rates, schedules and batches.
    steps: optimizer steps of the whole run.
    apply: the model with what is trained.
    objective: what is learned from a batch.
  """

  options: Any
  adapter: AdapterOptions
  optimisation: OptimisationOptions
  steps: int
  apply: Apply
  objective: "Objective"


@dataclasses.dataclass(frozen=True)
class NoOptions:
  """Of a method that has none."""


def baselines():
  """The library's baselines, which are imported when this is called."""
  from bilora_jax import baselines

  return baselines


def _gradient(setting: Setting) -> "bilora_jax.baselines.GradientEstimator":
  del setting
  return baselines().gradient()


def _update(
  setting: Setting, optimizer: "optax.GradientTransformation"
) -> "optax.GradientTransformation":
  del setting
  return optimizer


@dataclasses.dataclass(frozen=True)
class MethodSpec:
  """A way to fine-tune.

  Where the gradient is taken is a `GradientEstimator`, what is done with it an
  Optax transformation.

  Attributes:
    name: what `--method` takes.
    summary: what is trained and how, a clause.
    options: a dataclass of its own options.
    trains: adapters, all parameters of the model, or its new head alone.
    estimator: where the gradient is taken.
    transformation: what is put around the optimizer.
    gradients: gradients over a whole batch that a step takes, in the mean, by
      the options.
    perturbs_weights: whether the estimator perturbs the frozen weights too.
    has_auxiliary: whether there is a second adapter in a ball, whose options
      have `rho` and `auxiliary_rank`.
    sketches: whether the estimator adds an auxiliary of its own, which is not
      trained, and whose options have `auxiliary_rank`.
    visits: steps in a row that meet a batch before the next one comes.
    keeps_auxiliary: whether that one is evaluated and kept, by the options.
    begin: from the adapters' `init` to the method's own.
    training_apply: from the model to what is differentiated in training.
    check: refuses options that do not fit each other, with a UsageError.
  """

  name: str
  summary: str
  options: type = NoOptions
  trains: Literal["adapters", "parameters", "head"] = "adapters"
  estimator: Callable[[Setting], "bilora_jax.baselines.GradientEstimator"] = (
    _gradient
  )
  transformation: Callable[
    [Setting, "optax.GradientTransformation"], "optax.GradientTransformation"
  ] = _update
  gradients: Callable[[Any], float] = lambda options: 1.0
  perturbs_weights: bool = False
  has_auxiliary: bool = False
  sketches: bool = False
  visits: int = 1
  keeps_auxiliary: Callable[[Any], bool] = lambda options: False
  begin: Callable[[Any, Init], Init] = lambda options, init: init
  training_apply: Callable[[Any, Apply], Apply] = lambda options, apply: apply
  check: Callable[[Any, AdapterOptions, OptimisationOptions], None] = (
    lambda options, adapter, optimisation: None
  )

  @property
  def has_adapters(self) -> bool:
    return self.trains == "adapters"


class Chosen(NamedTuple):
  """A method and its options.

  Attributes:
    name: of the method.
    options: of its spec's `options`.
  """

  name: str
  options: Any

  @property
  def spec(self) -> MethodSpec:
    return get(self.name)

  @property
  def gradients(self) -> float:
    """Gradients over a whole batch that a step takes, in the mean."""
    return self.spec.gradients(self.options)


_ADDED: dict[str, MethodSpec] = {}


DEFAULT = "bilora"


def register(spec: MethodSpec) -> MethodSpec:
  """Adds a method to those of `--method`.

  Raises:
    ValueError: if another method has its name.
  """
  if spec.name in _built_in() or _ADDED.get(spec.name, spec) is not spec:
    raise ValueError(f"There is a method {spec.name!r} already.")
  _ADDED[spec.name] = spec
  return spec


def every() -> dict[str, MethodSpec]:
  """All methods by their names, the default first."""
  return {**_built_in(), **_ADDED}


def get(name: str) -> MethodSpec:
  """The method of that name.

  Raises:
    UsageError: if there is none.
  """
  if name not in every():
    raise UsageError(
      f"--method must be one of {', '.join(every())}; got {name!r}."
    )
  return every()[name]


def default() -> Chosen:
  """The method that is trained by if none is named."""
  return Chosen(DEFAULT, get(DEFAULT).options())


def having(option: str) -> str:
  """The methods that have an option, in a sentence's part."""
  return options_lib.listed(
    spec.name
    for spec in every().values()
    if option in options_lib.fields(spec.options)
  )


@functools.cache
def _built_in() -> dict[str, MethodSpec]:
  files = (importlib.import_module(f"{__package__}.{x}") for x in _FILES)
  return {spec.name: spec for file in files for spec in file.SPECS}
