"""One trace for the runs of one program in a process of tests.

A run that resumes, or that differs from another in where it writes, builds the
functions of its configuration anew, and JAX traces them as it would others.
Here equal arguments give the same functions, which JAX has traced. So do equal
features of the frozen base the linear model that was fitted to them.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
import pytest

from train.data import scores
from train.methods import method as methods
from train.run import diagnostics, step

_MOST = 32  # of the last runs: compiled programs take memory
_known: dict[Hashable, Any] = {}


def share(patch: pytest.MonkeyPatch) -> None:
  """Shares what makes a run's functions, until the patch ends."""
  for module, name in (
    (methods, "build"),
    (step, "make_train_step"),
    (step, "make_eval_step"),
    (step, "make_features"),
    (diagnostics, "make"),
  ):
    patch.setattr(module, name, once(getattr(module, name)))
  patch.setattr(scores, "linear", once(scores.linear, _content))


def once(
  make: Callable[..., Any], key_of: Callable[[Any], Hashable] | None = None
) -> Callable[..., Any]:
  """The function, that gives what it gave for equal arguments.

  Args:
    make: the function.
    key_of: of a leaf of the arguments, what is equal for equal ones; None has
      an array's shape and dtype stand for it.
  """

  def made(*arguments, **more):
    leaves, structure = jax.tree.flatten((arguments, more))
    key = make, structure, tuple(map(key_of or _key, leaves))
    try:
      hash(key)
    except TypeError:  # as of a number that is traced
      return make(*arguments, **more)
    if key not in _known:
      _known[key] = make(*arguments, **more)
      if len(_known) > _MOST:
        del _known[next(iter(_known))]
    return _known[key]

  return made


def _key(leaf: Any) -> Hashable:
  """Of an example input its shape; of anything else, itself."""
  if isinstance(leaf, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
    return leaf.shape, str(leaf.dtype)
  return leaf


def _content(leaf: Any) -> Hashable:
  """Of an array its numbers; of anything else, itself."""
  if isinstance(leaf, np.ndarray):
    return leaf.shape, str(leaf.dtype), leaf.tobytes()
  return leaf
