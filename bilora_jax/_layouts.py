"""`Layout`: how a host stores its LoRA; `joined` trains it as Bi-LoRA."""

from collections.abc import Mapping
import dataclasses
from typing import Any, cast

from flax import traverse_util
import jax
import optax

from bilora_jax import _partition
from bilora_jax._factors import Factors


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where a host library keeps the factors of its LoRA, of rank r1 + r2.

  A leaf belongs to a pair if its path, with `/` between the keys, ends in `a`
  or `b`; the rest of the path is the pair's name. An end that begins with a
  letter or a digit matches whole keys, so that `a` does not match `alpha`. An
  end like `_lora_a` also matches the ends of keys. `/a` is the same as `a`. The
  last axis of the host's `a` is the rank. The host's `b` has the rank after the
  leading batch axes (scanned layers, experts); both factors have
  `min(a.ndim, b.ndim) - 2` of these. All other leaves are `extra`.

  Attributes:
    a: end of the path of the factor that multiplies the input.
    b: end of the path of the other factor.
    scale: the host's scale of the product, at rank r1 + r2.

  Examples:
    >>> Layout('lora/a', 'lora/b', scale=1.0)  # of google-deepmind/gemma
    Layout(a='lora/a', b='lora/b', scale=1.0)
  """

  a: str
  b: str
  scale: float

  def split(self, tree: Any, primary_rank: int) -> dict[str, Any]:
    """Splits the host's tree into primary, auxiliary and extra.

    Args:
      tree: the host's trained parameters: nested dicts, `nnx.State`, or any
        pytree.
      primary_rank: r1; the first r1 columns are the primary.

    Returns:
      A dict of `primary`, `auxiliary` and `extra`.

    Raises:
      ValueError: if no pair is found, a pair lacks a factor, the factors have
        different ranks, or the rank is not above `primary_rank`.
    """
    pairs, extra = self._pairs(tree)
    halves = {}
    for name, (a, b) in pairs.items():
      if _masked(a) or _masked(b):
        halves[name] = (Factors(a, b, self.scale),) * 2
        continue
      a, b = _as_matrices(name, a, b)
      pair = Factors(a, b, self.scale)
      if not 0 < primary_rank < pair.rank:
        raise ValueError(
          f"primary_rank is above 0 and below the rank of the host's LoRA, "
          f"{pair.rank} at {name!r}, so that the auxiliary has a rank too; got "
          f"{primary_rank}."
        )
      halves[name] = pair.split(primary_rank)
    return {
      "primary": {name: half[0] for name, half in halves.items()},
      "auxiliary": {name: half[1] for name, half in halves.items()},
      "extra": extra,
    }

  def join(self, adapters: Mapping[str, Any], like: Any) -> Any:
    """Undoes `split`.

    Args:
      adapters: with or without the auxiliary. Without it, the result is the
        host's LoRA of rank r1: if you reduce the host's rank, keep its scale.
      like: a tree of the host, for structure and shapes.

    Returns:
      A tree like `like`.
    """
    leaves = dict(adapters.get("extra", {}))
    host, _ = self._pairs(like)
    for name, pair in adapters["primary"].items():
      other = adapters.get("auxiliary", {}).get(name)
      if not (_masked(pair.a) or other is None):
        pair = pair.join(other)
      a, b = host[name]
      if not _masked(pair.a):
        pair = dataclasses.replace(
          pair,
          a=pair.a.reshape(*a.shape[:-1], pair.rank),
          b=pair.b.reshape(_with_rank(a, b, pair.rank)),
        )
      for end, leaf in ((self.a, pair.a), (self.b, pair.b)):
        leaves[(name + end).removeprefix("/")] = leaf
    return jax.tree_util.tree_map_with_path(
      lambda path, _: leaves[_name(path)], like, is_leaf=_masked
    )

  def primary(self, tree: Any, primary_rank: int) -> Any:
    """Drops the auxiliary: returns the host's tree with a LoRA of rank r1."""
    adapters = self.split(tree, primary_rank)
    return self.join(_partition.primary(adapters), like=tree)

  def as_primary(self, tree: Any) -> dict[str, Any]:
    """Converts a plain LoRA of the host to adapters without an auxiliary.

    Args:
      tree: as in `split`, or as Orbax restores it without a target.

    Returns:
      Adapters of `adapt`, nested by the paths of the weights, with all other
      leaves in `extra`. `peft.save` takes them, and a run can continue from
      them.

    Raises:
      ValueError: if no pair is found, a pair lacks a factor, or the factors
        have different ranks.
    """
    pairs, extra = self._pairs(tree)
    primary = {
      name: Factors(*_as_matrices(name, a, b), self.scale)
      for name, (a, b) in pairs.items()
    }
    parts = {"primary": primary, "extra": extra}
    return {
      part: traverse_util.unflatten_dict(leaves, sep="/")
      for part, leaves in parts.items()
      if leaves
    }

  def _pairs(self, tree: Any):
    pairs: dict[str, list[Any]] = {}
    extra = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=_masked
    ):
      name = _name(path)
      for i, end in enumerate((self.a, self.b)):
        whole = f"/{end}" if end[:1].isalnum() else end
        if f"/{name}".endswith(whole):
          # At the root there is no `/` to remove.
          rest = name[: max(len(name) - len(end), 0)]
          pairs.setdefault(rest, [None, None])[i] = leaf
          break
      else:
        extra[name] = leaf
    single = sorted(
      name for name, pair in pairs.items() if any(x is None for x in pair)
    )
    if single or not pairs:
      raise ValueError(
        f"a LoRA has leaves whose paths end in {self.a!r} and {self.b!r}; got "
        + (
          f"only one of the two for {single}."
          if single
          else f"none among {sorted(extra)[:10]}."
        )
      )
    return pairs, extra


def qwix_layout(scale: float) -> Layout:
  """The layout of `qwix.apply_lora_to_model`: `kernel_lora_a`, `_lora_b`.

  Args:
    scale: `alpha / rank` of the `qwix.LoraRule`, whose rank is r1 + r2. To keep
      LoRA's scale `alpha / r1`, give the rule `alpha * (r1 + r2) / r1`.
  """
  return Layout("_lora_a", "_lora_b", scale)


def nnx_lora_layout() -> Layout:
  """The layout of `flax.nnx.LoRA` and `nnx.LoRALinear`, which have scale 1."""
  return Layout("lora_a", "lora_b", 1.0)


def joined(
  tx: optax.GradientTransformation, layout: Layout, primary_rank: int
) -> optax.GradientTransformationExtraArgs:
  """Lets `bilora` train one LoRA of rank r1 + r2 of a host library.

  Use it with trainers that have their own loop and parameters, as
  `nnx.Optimizer` or Tunix: it splits the host's tree along the rank, applies
  `tx`, and joins the updates again. The model does not change.

  Args:
    tx: a transformation of the partition, such as `bilora(optimizer)`.
    layout: how the host stores its pairs.
    primary_rank: r1.

  Returns:
    A transformation of the host's tree.

  Raises:
    ValueError: on init, as `Layout.split`.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bilora_jax import bilora, joined, nnx_lora_layout
    >>> params = {'lora_a': jnp.ones((4, 3)), 'lora_b': jnp.zeros((3, 5))}
    >>> tx = joined(bilora(optax.adam(1e-3)), nnx_lora_layout(), primary_rank=2)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> updates['lora_b'].shape
    (3, 5)
  """
  tx = optax.with_extra_args_support(tx)

  def init_fn(params):
    if _partition.is_placeholder(params):
      return tx.init(params)
    return tx.init(layout.split(params, primary_rank))

  def update_fn(updates, state, params=None, **extra_args):
    new, state = tx.update(
      layout.split(updates, primary_rank),
      state,
      None if params is None else layout.split(params, primary_rank),
      **extra_args,
    )
    return layout.join(cast(Mapping[str, Any], new), like=updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def _name(path: Any) -> str:
  keys = [
    getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
    for key in path
  ]
  # An nnx.Variable is a node whose only leaf is its value.
  if keys and keys[-1] == "value":
    keys = keys[:-1]
  return "/".join(map(str, keys))


def _batch_axes(a: Any, b: Any) -> int:
  return min(a.ndim, b.ndim) - 2


def _as_matrices(name: str, a: Any, b: Any) -> tuple[Any, Any]:
  k = _batch_axes(a, b)
  if k < 0 or a.shape[:k] != b.shape[:k] or b.shape[k] != a.shape[-1]:
    raise ValueError(
      "a pair has shapes (*batch, ..., rank) and (*batch, rank, ...); got "
      f"{tuple(a.shape)} and {tuple(b.shape)} at {name!r}."
    )
  batch, rank = a.shape[:k], a.shape[-1]
  return a.reshape(*batch, -1, rank), b.reshape(*batch, rank, -1)


def _with_rank(a: Any, b: Any, rank: int) -> tuple[int, ...]:
  k = _batch_axes(a, b)
  return (*b.shape[:k], rank, *b.shape[k + 1 :])
