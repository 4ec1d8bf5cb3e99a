"""Shardings of a training state, which follow those of the kernels."""

from typing import Any

from flax import linen as nn
import jax

from ..devices import mesh as mesh_lib
from ..methods.method import Method
from .step import TrainState


def of(
  layout: mesh_lib.Layout,
  method: Method,
  axes: Any,
  variables: Any,
  state: TrainState,
) -> TrainState | None:
  """Returns the shardings of a training state; None without a mesh.

  A factor of an adapter is split over the mesh axes of both sides of its
  kernel. The optimizer's arrays are split like the adapters that they belong
  to.

  Args:
    layout: the layout of the run.
    method: the method of the run.
    axes: a tree like `variables`, with the names of the axes.
    variables: the variables of the model, or their shapes.
    state: the training state, or its shapes.
  """
  replicated: Any = layout.replicated
  if replicated is None:
    return None
  if method.adapted is None:
    trained = layout.shardings(axes["params"], state.trained)
  else:
    boxed = jax.tree.map(
      lambda names, x: nn.Partitioned(x, tuple(names)),
      axes,
      variables,
      is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
    )
    names = method.adapted.partition_specs(boxed, state.trained)
    trained = {
      part: layout.shardings(names[part], tree)
      if part == "extra"
      else layout.shardings(names[part], tree, mesh_lib.FACTOR_RULES)
      for part, tree in state.trained.items()
    }
  return TrainState(
    step=replicated,
    trained=trained,
    opt_state=_following(state.opt_state, state.trained, trained, replicated),
    estimator=_following(state.estimator, state.trained, trained, replicated),
    key=replicated,
  )


def _following(tree: Any, trained: Any, shardings: Any, otherwise: Any) -> Any:
  # Each tree in an optimizer's state has the structure of the optimized tree or
  # of a part of it. So the end of a path says which array it belongs to.
  paths = jax.tree_util.tree_leaves_with_path(trained)
  known = {
    path: (x.shape, sharding)
    for (path, x), sharding in zip(paths, jax.tree.leaves(shardings))
  }

  def follow(path, x):
    for start in range(len(path)):
      shape, sharding = known.get(path[start:], (None, None))
      if shape == x.shape:
        return sharding
    return otherwise

  return jax.tree_util.tree_map_with_path(follow, tree)
