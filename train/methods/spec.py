"""`MethodSpec`, the record of a method, and the methods of `--method`."""

from collections.abc import Callable
import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .. import options as options_lib
from ..errors import UsageError
from .options import AdapterOptions, OptimisationOptions

# The command line needs the names and the options of all methods. It answers in
# half a second because it does not import JAX: a method imports JAX only when
# the method is built.
if TYPE_CHECKING:
  import optax

  import bilora_jax

  from ..data.objectives import Objective

Apply = Callable[..., Any]
"""From `(variables, trained, *inputs, rngs=None)` to the logits."""
Init = Callable[[Any, Any], Any]
"""From `(key, variables)` to the trained arrays."""

# The modules whose `SPECS` are the built-in methods. The first module has the
# default method.
_FILES = ("bilora", "lora", "sam", "nystroem", "noise", "parameters")


class Setting(NamedTuple):
  """The run that a method is built for.

  Attributes:
    options: the method's own options.
    adapter: the options of the adapters.
    optimisation: the options of the optimizer and the batches.
    steps: optimizer steps of the whole run.
    apply: from the variables, the trained arrays and inputs to the logits.
    objective: the objective of the loss.
  """

  options: Any
  adapter: AdapterOptions
  optimisation: OptimisationOptions
  steps: int
  apply: Apply
  objective: "Objective"


@dataclasses.dataclass(frozen=True)
class NoOptions:
  """The options of a method that has none."""


def baselines():
  """Imports and returns the library's baselines."""
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

  A `GradientEstimator` computes the gradient, and an Optax transformation makes
  the update from it.

  Attributes:
    name: the name, as in `--method`.
    summary: a clause that says what is trained, and how.
    options: the dataclass of the method's own options.
    trains: adapters, all parameters of the model, or its new head alone.
    estimator: makes the estimator of the gradient.
    transformation: from the setting and the optimizer to the transformation of
      the gradient, in which the optimizer is a part.
    gradients: from the options to the mean number of gradients, over a whole
      batch, that a step takes.
    perturbs_weights: whether the estimator perturbs the frozen weights, too.
    has_auxiliary: whether the method trains a second adapter in a ball; its
      options then have `rho` and `auxiliary_rank`.
    sketches: whether the estimator adds an auxiliary of its own, which is not
      trained; the options then have `auxiliary_rank`.
    visits: how many steps in a row use the same batch.
    keeps_auxiliary: from the options to whether the second adapter is evaluated
      and kept.
    begin: from the options and the `init` of the adapters to the method's
      `init`.
    training_apply: from the options and `apply` to the `apply` that is
      differentiated in training.
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
    name: the name of the method.
    options: an instance of the `options` of its spec.
  """

  name: str
  options: Any

  @property
  def spec(self) -> MethodSpec:
    return get(self.name)

  @property
  def gradients(self) -> float:
    """The mean number of gradients, over a whole batch, that a step takes."""
    return self.spec.gradients(self.options)


_ADDED: dict[str, MethodSpec] = {}


DEFAULT = "bilora"


def register(spec: MethodSpec) -> MethodSpec:
  """Adds a method to the choices of `--method`.

  Raises:
    ValueError: if another method has its name.
  """
  if spec.name in _built_in() or _ADDED.get(spec.name, spec) is not spec:
    raise ValueError(f"There is a method {spec.name!r} already.")
  _ADDED[spec.name] = spec
  return spec


def every() -> dict[str, MethodSpec]:
  """Returns all methods by their names; the default is the first."""
  return {**_built_in(), **_ADDED}


def get(name: str) -> MethodSpec:
  """Returns the method of that name.

  Raises:
    UsageError: if there is no such method.
  """
  if name not in every():
    raise UsageError(
      f"--method must be one of {', '.join(every())}; got {name!r}."
    )
  return every()[name]


def default() -> Chosen:
  """Returns the method of a run that names none, with default options."""
  return Chosen(DEFAULT, get(DEFAULT).options())


def having(option: str) -> str:
  """Joins the names of all methods that have an option, for messages."""
  return options_lib.listed(
    spec.name
    for spec in every().values()
    if option in options_lib.fields(spec.options)
  )


@functools.cache
def _built_in() -> dict[str, MethodSpec]:
  files = (importlib.import_module(f"{__package__}.{x}") for x in _FILES)
  return {spec.name: spec for file in files for spec in file.SPECS}
