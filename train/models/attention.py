"""Attention: one function, and the kernels that it chooses from.

Shapes: B batch, L queries, S keys, H heads, J key-value heads, G = H/J, K head
width, M segments.

cuDNN's kernels and splash attention keep no array of L x S; 'matmul' and 'xla'
do. The choice is made while a program is traced. `jax.lax.platform_dependent`
would trace every branch, and cuDNN's asks for a GPU's library while it is
traced; under a gradient it would keep the residuals of all of them.
"""

import functools
from typing import Any, NamedTuple

from flax.linen import spmd
import jax
from jax import typing
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp

CHOICES = ("auto", "matmul", "xla", "cudnn", "splash")

# Finite, as a query with every key masked has a finite softmax then.
_MASKED = -1e9
_HALVES = (jnp.bfloat16, jnp.float16)
# Splash attention's blocks are multiples of a TPU's lanes; the largest that
# divides the length is used.
_LANES, _BLOCKS = 128, (1024, 512, 256, 128)


class Seen(NamedTuple):
  """Which keys a query sees, in the form that a choice of kernel takes.

  Attributes:
    mask: bool (B, L, S), or (1, L, S). None: there is none of that size.
    lengths: tokens of each segment of a row, from its first token on, int32
      (B, M). A query sees its own segment. What follows the last is padding.
    segment_ids: int32 (B, L); a query sees the keys that have its id.
  """

  mask: jax.Array | None = None
  lengths: jax.Array | None = None
  segment_ids: jax.Array | None = None


def chosen(choice: str, dtype: typing.DTypeLike, head_size: int) -> str:
  """The kernel of a choice: for 'auto', that of this process's backend.

  On CPU it is 'matmul', batched products with heads in front, for whose
  backward pass XLA has fast code; on TPU 'splash'; on a GPU 'cudnn', or 'xla'
  where cuDNN does not take the dtype or the width.

  Args:
    choice: one of `CHOICES`.
    dtype: of queries, keys and values.
    head_size: K.

  Returns:
    One of `CHOICES` that is not 'auto'.

  Raises:
    ValueError: the choice is unknown, or asks for cuDNN where it has no kernel.
  """
  if choice not in CHOICES:
    raise ValueError(
      f"attention must be one of {', '.join(CHOICES)}, got {choice!r}."
    )
  if choice == "cudnn":
    if reason := without_cudnn(dtype, head_size):
      raise ValueError(f"attention='cudnn' {reason}.")
  if choice != "auto":
    return choice
  backend = jax.default_backend()
  if backend == "tpu":
    return "splash"
  if backend != "gpu":
    return "matmul"
  has_kernels = _is_cuda() and not without_cudnn(dtype, head_size)
  return "cudnn" if has_kernels else "xla"


def without_cudnn(dtype: typing.DTypeLike, head_size: int) -> str | None:
  """Why cuDNN has no kernel; None if it has one. The arguments: `chosen`'s."""
  if jnp.dtype(dtype) not in _HALVES:
    return f"takes bfloat16 or float16, got {jnp.dtype(dtype)}"
  widest = 256 if cudnn.check_compute_capability("9.0") else 128
  if head_size > widest or head_size % 8:
    return (
      f"takes heads whose width is a multiple of 8 and at most {widest}, got "
      f"{head_size}"
    )
  return None


def causal(choice: str, length: int, lengths: jax.Array | None = None) -> Seen:
  """What causal attention sees: the tokens up to itself, of its segment.

  A row that is one segment, with padding after it, needs no mask but the causal
  one: no token of it comes after padding.

  Args:
    choice: from `chosen`.
    length: L.
    lengths: tokens of each segment of a row, int (B, M); 0 if a row has fewer.
      None: a row is one segment.
  """
  if lengths is not None and lengths.shape[1] == 1:
    lengths = None
  if choice == "cudnn":
    return Seen(lengths=lengths)
  segment_ids = None if lengths is None else ids(lengths, length)
  if choice == "splash":
    return Seen(segment_ids=segment_ids)
  mask_1xLxL = jnp.tri(length, dtype=bool)[None]
  if segment_ids is None:
    return Seen(mask_1xLxL)
  same_BxLxL = segment_ids[:, :, None] == segment_ids[:, None, :]
  return Seen(same_BxLxL & mask_1xLxL)


def ids(lengths: jax.Array, length: int) -> jax.Array:
  """Segment ids from 1, 0 at padding, int (B, L), of lengths (B, M)."""
  stops_Bx1xM = jnp.cumsum(lengths, 1)[:, None]
  past_BxLxM = jnp.arange(length)[:, None] >= stops_Bx1xM
  return jnp.where(past_BxLxM.all(-1), 0, past_BxLxM.sum(-1) + 1)


def positions(lengths: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
  """Places from 0 in each segment, int `shape`, which is (B, L).

  Args:
    lengths: as in `causal`.
    shape: of the tokens.
  """
  places_BxL = jnp.broadcast_to(jnp.arange(shape[1]), shape)
  if lengths is None or lengths.shape[1] == 1:
    return places_BxL
  stops_Bx1xM = jnp.cumsum(lengths, 1)[:, None]
  past_BxLxM = places_BxL[..., None] >= stops_Bx1xM
  return places_BxL - jnp.where(past_BxLxM, stops_Bx1xM, 0).max(-1)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: Seen,
  choice: str,
  causal: bool = True,
) -> jax.Array:
  """Softmax of the scaled products of queries and keys, times the values.

  The softmax is float32, whatever the products are in.

  Args:
    q: queries (B, L, H, K).
    k: keys (B, S, J, K), of which J divides H.
    v: values (B, S, J, K).
    seen: from `causal`; or a mask alone, which holds for all choices.
    choice: from `chosen`.
    causal: whether a query sees none of the keys after it. A mask says so
      itself.

  Returns:
    (B, L, H, K) in the dtype of q. What stands at padding is finite and means
    nothing.
  """
  if choice == "matmul":
    return _matmul(q, k, v, seen.mask)
  if seen.mask is not None and (choice != "cudnn" or _is_odd(seen.mask)):
    choice = "xla"
  if choice == "xla":
    mask = None if seen.mask is None else seen.mask[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)
  kernel = _cudnn if choice == "cudnn" else _splash
  return _on_mesh(functools.partial(kernel, causal=causal), q, k, v, seen)


def _is_odd(mask: jax.Array) -> bool:
  """Whether cuDNN has no backward pass for a mask of these sizes."""
  return bool(mask.shape[1] % 2 or mask.shape[2] % 2)


def _matmul(q_BxLxHxK, k_BxSxJxK, v_BxSxJxK, mask_BxLxS):
  batch, length, heads, size = q_BxLxHxK.shape
  slots, groups = k_BxSxJxK.shape[1:3]
  # The queries that share a key are rows of one product.
  q_BxJxGLxK = (
    q_BxLxHxK.reshape(batch, length, groups, -1, size)
    .transpose(0, 2, 3, 1, 4)
    .reshape(batch, groups, -1, size)
  )
  scores_BxJxGxLxS = jnp.matmul(
    q_BxJxGLxK,
    k_BxSxJxK.transpose(0, 2, 3, 1),
    preferred_element_type=jnp.float32,
  ).reshape(batch, groups, -1, length, slots)
  scores_BxJxGxLxS *= size**-0.5
  if mask_BxLxS is not None:
    scores_BxJxGxLxS = jnp.where(
      mask_BxLxS[:, None, None], scores_BxJxGxLxS, _MASKED
    )
  probs_BxJxGxLxS = jax.nn.softmax(scores_BxJxGxLxS).astype(v_BxSxJxK.dtype)
  y_BxJxGLxK = jnp.matmul(
    probs_BxJxGxLxS.reshape(batch, groups, -1, slots),
    v_BxSxJxK.transpose(0, 2, 1, 3),
  )
  y_BxLxJxGxK = y_BxJxGLxK.reshape(batch, groups, -1, length, size).transpose(
    0, 3, 1, 2, 4
  )
  return y_BxLxJxGxK.reshape(batch, length, heads, size)


def _cudnn(q, k, v, seen, causal):
  if seen.lengths is not None and seen.lengths.shape[1] > 1:
    return _cudnn_packed(q, k, v, seen.lengths, causal)
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=None if seen.mask is None else seen.mask[:, None],
    is_causal=causal and seen.mask is None,
    key_value_seq_lengths=(
      None if seen.lengths is None else seen.lengths[:, 0].astype(jnp.int32)
    ),
    implementation="cudnn",
  )


def _cudnn_packed(q, k, v, lengths_BxM, causal):
  """Every segment by itself, without a mask (cuDNN's ragged layout)."""
  length, heads, size = q.shape[1:]
  # jax 0.10 takes the keys' offsets for those of as many heads as queries have.
  k, v = (jnp.repeat(x, heads // x.shape[2], 2) for x in (k, v))
  # Padding is a segment too: what no segment holds, cuDNN would not write.
  padding_Bx1 = length - lengths_BxM.sum(1, keepdims=True)
  lengths_BxM = jnp.concatenate([lengths_BxM, padding_Bx1], 1)
  lengths_BxM = lengths_BxM.astype(jnp.int32)
  starts_BxM = jnp.cumsum(lengths_BxM, 1) - lengths_BxM
  there_BxM = lengths_BxM > 0
  lengths_BxM = jnp.where(there_BxM, lengths_BxM, -1)
  offsets_BxM1 = jnp.pad(
    jnp.where(there_BxM, starts_BxM, -1), ((0, 0), (0, 1)), constant_values=-1
  )
  kind = cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING
  return cudnn.dot_product_attention(
    q,
    k,
    v,
    q_seqlen=lengths_BxM,
    kv_seqlen=lengths_BxM,
    q_offsets=offsets_BxM1,
    kv_offsets=offsets_BxM1,
    scale=size**-0.5,
    mask_type=kind,
  )


def _splash(q, k, v, seen, causal, interpret=False):
  length, heads, size = q.shape[1:]
  padding = -length % _LANES
  ids_BxL = seen.segment_ids
  if ids_BxL is None and padding:
    ids_BxL = jnp.ones(q.shape[:2], jnp.int32)
  if padding:
    ids_BxL = jnp.pad(ids_BxL, ((0, 0), (0, padding)))
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    for x in (q * size**-0.5, k, v)
  )
  whole = length + padding
  block = next(x for x in _BLOCKS if whole % x == 0)
  one = splash.CausalMask if causal else splash.FullMask
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([one((whole, whole))] * heads),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    interpret=interpret,
  )
  segments: Any = None
  if ids_BxL is not None:
    segments = splash.SegmentIds(ids_BxL, ids_BxL)
  y_BxHxLxK = jax.vmap(kernel)(q, k, v, segments)
  return y_BxHxLxK.transpose(0, 2, 1, 3)[:, :length].astype(q.dtype)


def _on_mesh(kernel, q, k, v, seen):
  """Runs a kernel on each device's rows and heads: XLA cannot split it."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(q, k, v, seen)

  def split(shape, names):
    found = spmd.logical_to_mesh_axes(names) or names
    return [
      axis if axis and size % _size(mesh, axis) == 0 else None
      for axis, size in zip(found, shape)
    ]

  # Heads are split where their keys' are; else each device has all.
  rows, _, heads, _ = split(k.shape, ("batch", None, "kv_heads", None))
  spec = jax.sharding.PartitionSpec(rows, None, heads, None)
  by_row = jax.sharding.PartitionSpec(rows)
  return jax.shard_map(
    kernel,
    in_specs=(spec, spec, spec, jax.tree.map(lambda x: by_row, seen)),
    out_specs=spec,
    check_vma=False,
  )(q, k, v, seen)


def _size(mesh, axis):
  axes = axis if isinstance(axis, tuple) else (axis,)
  size = 1
  for name in axes:
    size *= mesh.shape[name]
  return size


def _is_cuda() -> bool:
  return "cuda" in jax.extend.backend.get_backend().platform_version
